"""Ctrl-C while ``llamafactory-cli chat`` with ``use_kt`` imports its libraries, which takes seconds.

Python would end in the traceback of an import, or transformers in one that says that a module is missing.
"""

from __future__ import annotations

import os
import signal
import sys
from importlib import import_module
from pathlib import Path
from threading import current_thread, main_thread
from typing import Any


def end_imports_at_once() -> None:
    """Until :func:`imports_have_ended`, let Ctrl-C end such a process with one line. Other programs are left alone."""
    argv = getattr(sys, "argv", [])  # programs that embed Python may have none
    if (
        argv[1:2] == ["chat"]
        and Path(argv[0]).name in ("llamafactory-cli", "lmf")
        and current_thread() is main_thread()
        and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    ):
        signal.signal(signal.SIGINT, _end)


def imports_have_ended() -> None:
    """From now on, Ctrl-C raises KeyboardInterrupt again."""
    if signal.getsignal(signal.SIGINT) is _end:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _end(number: int, frame: Any) -> None:
    # by its name, as bootstrap names what comes after ``import torch``; LLaMA-Factory takes "chat" off the command line
    asks_for = import_module(f"{__package__}.patching").asks_for
    if not asks_for("use_kt", command_line=sys.argv[1 + (sys.argv[1:2] == ["chat"]) :]):
        signal.default_int_handler(number, frame)
    os.write(2, b"\nInterrupted.\n" if os.isatty(2) else b"Interrupted.\n")
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    os.kill(os.getpid(), signal.SIGINT)
