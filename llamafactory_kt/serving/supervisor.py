"""The process between LLaMA-Factory and SGLang: it runs the server and ends it when LLaMA-Factory is gone.

Run as a file, with the server's command as arguments; imports nothing of this package. Its stdin is a pipe that
LLaMA-Factory holds open; the end of the pipe means that LLaMA-Factory is gone, whatever killed it. The server is asked
to end, then killed, with everything it started. Should the supervisor itself be killed, the kernel kills the server
(PR_SET_PDEATHSIG; set here and not by LLaMA-Factory, because it is about the thread that starts a process, and web
servers start chats in threads that end).
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
"""seconds that a server gets to end by itself"""

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def run(command: list[str]) -> int:
    """Run the command until it ends or stdin does; returns its exit status."""
    for number in (signal.SIGINT, signal.SIGTERM):  # Ctrl-C is for LLaMA-Factory, which then closes the pipe
        signal.signal(number, signal.SIG_IGN)
    server = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, start_new_session=True, preexec_fn=_prepare_server, close_fds=True
    )
    ended = os.pidfd_open(server.pid)
    ready, _, _ = select.select([sys.stdin.fileno(), ended], [], [])
    family = _family(server.pid)
    if ended not in ready:
        _end(server, family)
    for process in family:  # also those that a server leaves behind when it fails
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    with contextlib.suppress(ProcessLookupError):
        os.killpg(server.pid, signal.SIGKILL)
    return server.wait()


def _prepare_server() -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    _die_with_parent()


def _family(pid: int) -> list[psutil.Process]:
    try:
        return psutil.Process(pid).children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def _end(server: subprocess.Popen[bytes], family: list[psutil.Process]) -> None:
    server.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        server.wait(PATIENCE)
    psutil.wait_procs(family, timeout=1)
    server.kill()


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
