"""Standard input and output that take any bytes and any text, and a stdout that native libraries do not write into."""

from __future__ import annotations

import codecs
import contextlib
import ctypes
import io
import locale
import logging
import os
import sys


def take_any_text() -> None:
    """Let the standard streams replace what they cannot decode or encode, instead of raising. ASCII, which an unset locale means,
    becomes UTF-8: for Python's streams, and for readline, which asks the environment."""
    if _is_ascii(locale.getencoding()):
        with contextlib.suppress(locale.Error):  # a system without it
            locale.setlocale(locale.LC_CTYPE, "C.UTF-8")
            os.environ["LC_ALL"] = "C.UTF-8"
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # not what a program has put in its place
            with contextlib.suppress(io.UnsupportedOperation):  # stdin that has been read from
                stream.reconfigure(encoding="utf-8" if _is_ascii(stream.encoding) else None, errors="replace")


def _is_ascii(encoding: str) -> bool:
    return codecs.lookup(encoding).name == "ascii"


def terminal_width(most: int) -> int:
    """Columns of the terminal that stdout is, at most ``most``; so many, too, where it is none: ``COLUMNS`` says nothing of a pipe."""
    try:
        return min(most, os.get_terminal_size(sys.stdout.fileno()).columns)
    except (OSError, ValueError, AttributeError):  # no terminal, no file, None
        return most


def keep_stdout_clean() -> None:
    """From now on, what libraries write to file descriptor 1, such as ``DNNL_VERBOSE=1``, goes to stderr; ``sys.stdout`` and the logs
    that go there stay. A terminal, which shows both, is left alone: ``input`` edits lines only on the real one."""
    stream = sys.stdout
    if not isinstance(stream, io.TextIOWrapper) or stream.isatty():
        return
    with contextlib.suppress(OSError):  # no stderr
        if stream.fileno() != 1:
            return
        stream.flush()
        ctypes.CDLL(None).fflush(None)
        kept = os.dup(1)
        os.dup2(2, 1)
        sys.stdout = io.TextIOWrapper(
            os.fdopen(kept, "wb"), stream.encoding, stream.errors, line_buffering=stream.line_buffering
        )
        for logger in (logging.root, *logging.root.manager.loggerDict.values()):
            for handler in getattr(logger, "handlers", ()):
                if isinstance(handler, logging.StreamHandler) and handler.stream is stream:
                    handler.setStream(sys.stdout)
