"""Runs the SGLang server and ends it when LLaMA-Factory is gone.

Run as a file, with the server's command as arguments; imports nothing of this package. Stdin is a pipe that LLaMA-Factory holds
open, so it closes however LLaMA-Factory ends. Then the server and everything it started are terminated, and killed if necessary.
If the supervisor itself is killed, the kernel kills the server (PR_SET_PDEATHSIG). LLaMA-Factory cannot use that signal
directly: it follows the thread that started the process, and web servers start chats in short-lived threads.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import subprocess
import sys

import psutil

PATIENCE = 10
"""seconds between SIGTERM and SIGKILL"""

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def run(command: list[str]) -> int:
    """Run the command until it ends or stdin is closed; returns its exit status."""
    for number in (signal.SIGINT, signal.SIGTERM):  # Ctrl-C is for LLaMA-Factory, which then closes the pipe
        signal.signal(number, signal.SIG_IGN)
    server = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, start_new_session=True, preexec_fn=_prepare_server, close_fds=True
    )
    ended = os.pidfd_open(server.pid)
    ready, _, _ = select.select([sys.stdin.fileno(), ended], [], [])
    family = _family(server.pid)
    if ended not in ready:
        server.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.wait(PATIENCE)
        psutil.wait_procs(family, timeout=1)
        server.kill()
    for process in family:  # a server that fails leaves some behind
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    with contextlib.suppress(ProcessLookupError):
        os.killpg(server.pid, signal.SIGKILL)
    return server.wait()


def _prepare_server() -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _family(pid: int) -> list[psutil.Process]:
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
