"""A running SGLang server of our own: started, waited for, watched, and ended."""

from __future__ import annotations

import atexit
import contextlib
import logging
import os
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import httpx

from ..ground.errors import KTServerError
from .command import ServerCommand

logger = logging.getLogger(__name__)

HOST = "127.0.0.1"
_ATTEMPTS = 3
_LAST_LINES = 30


class _PortTaken(KTServerError):
    """Another program got the port first."""


def start_server(command: ServerCommand, timeout: float) -> Server:
    """Start a server and wait until it answers; on another port if one was taken meanwhile.

    Raises:
        KTServerError: It ended, or is not ready after ``timeout`` seconds; with its last lines. Nothing of it runs on.
    """
    for _ in range(_ATTEMPTS):
        server = Server(command)
        logger.info("Starting SGLang at %s, its log in %s", server.url, server.log)
        try:
            server.wait_until_ready(timeout)
            return server
        except _PortTaken as error:
            server.close()
            logger.warning("%s Trying another.", str(error).splitlines()[0])
            taken = error
        except BaseException:
            server.close()
            raise
    raise taken


class Server:
    """One server on a free port of this machine. It ends with :meth:`close`, or with this process, however that ends."""

    def __init__(self, command: ServerCommand):
        self.command = command
        self.port = free_port()
        self._failed = False
        server = [*command.words, "--host", HOST, "--port", str(self.port)]
        # -P: the files beside the supervisor are no modules of its own.
        supervisor = [sys.executable, "-P", str(Path(__file__).with_name("supervisor.py"))]
        environment = {**os.environ, "LLAMAFACTORY_KT_DISABLE": "1"}  # the server needs no hooks
        with tempfile.NamedTemporaryFile(prefix="llamafactory-kt-sglang-", suffix=".log", delete=False) as log:
            self.log = Path(log.name)
            self._process = subprocess.Popen(
                [*supervisor, *server], env=environment, start_new_session=True,
                stdin=subprocess.PIPE, stdout=log, stderr=subprocess.STDOUT,
            )  # fmt: skip
        atexit.register(self.close)

    @property
    def url(self) -> str:
        return f"http://{HOST}:{self.port}"

    def wait_until_ready(self, timeout: float) -> None:
        """Wait for ``/health`` to answer.

        Raises:
            KTServerError: The server ended, another program has its port, or the time is over; with the server's last lines.
        """
        started = said = time.monotonic()
        with httpx.Client(base_url=self.url, timeout=10, trust_env=False) as client:
            while not self._answers(client):
                now = time.monotonic()
                if (status := self._process.poll()) is not None:
                    if self._port_taken():
                        raise _PortTaken(self._failure(f"Port {self.port} was taken by another program"))
                    raise KTServerError(self._failure(f"SGLang ended with exit status {status} before it was ready"))
                if now - started > timeout:
                    raise KTServerError(self._failure(f"SGLang was not ready after kt_sglang_timeout: {timeout:g} s"))
                if now - said > 60:
                    said = now
                    logger.info("SGLang is still loading after %d s; its log is %s", now - started, self.log)
                time.sleep(0.2)

    def _answers(self, client: httpx.Client) -> bool:
        try:
            if client.get("/health").status_code != 200:
                return False
            answer = client.get("/model_info")
            if answer.status_code == 404:  # its name in older servers
                answer = client.get("/get_model_info")
            found = answer.json().get("model_path")
        except (httpx.HTTPError, ValueError, AttributeError):
            return False
        if found != (own := self.command.parsed.model_path):
            raise _PortTaken(self._failure(f"Port {self.port} was taken by another server, of {found} and not {own}"))
        return True

    def _port_taken(self) -> bool:
        with socket.socket() as probe:
            return probe.connect_ex((HOST, self.port)) == 0

    def check(self) -> None:
        """Raise KTServerError, with the server's last lines, if it has ended or just does."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            status = self._process.wait(timeout=2)
            raise KTServerError(self._failure(f"SGLang has ended with exit status {status}"))

    def _failure(self, what: str) -> str:
        self._failed = True
        lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines() if self.log.exists() else []
        shown = "\n".join(f"  {line}" for line in lines[-_LAST_LINES:]) or "  (nothing)"
        return f"{what}.\nThe end of its log, {self.log}:\n{shown}\nIts command was:\n{self.command}"

    def close(self) -> None:
        """End the server and wait for that. A log that no error has named is removed. Calling it again does nothing."""
        atexit.unregister(self.close)
        with contextlib.suppress(OSError):
            assert self._process.stdin is not None
            self._process.stdin.close()
        self._process.wait()
        if not self._failed:
            self.log.unlink(missing_ok=True)


def free_port() -> int:
    """A TCP port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port: int = probe.getsockname()[1]
        return port
