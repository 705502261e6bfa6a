"""Runs an SGLang server: starts it, waits until it is ready, and ends it."""

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

from ..ground.atomic_output import writing
from ..ground.errors import KTServerError, first_line
from .command import ServerCommand

logger = logging.getLogger(__name__)

HOST = "127.0.0.1"
_ATTEMPTS = 3
_LAST_LINES = 30


class _PortTaken(KTServerError):
    """Another program took the port first."""


def start_server(command: ServerCommand, timeout: float) -> Server:
    """Start a server and wait until it answers. If another program takes its port first, try another one.

    Raises:
        KTServerError: The server ended, or is not ready after ``timeout`` seconds; with the end of its log. No process is left.
    """
    for _ in range(_ATTEMPTS):
        server = Server(command)
        logger.info("Starting SGLang at %s, its log in %s", server.url, server.log)
        try:
            server.wait_until_ready(timeout)
            return server
        except _PortTaken as error:
            server.close()
            logger.warning("%s Trying another.", first_line(error))
            taken = error
        except BaseException:
            server.close()
            raise
    raise taken


class Server:
    """One server on a free local port. It ends with :meth:`close` or with this process, even if that is killed."""

    def __init__(self, command: ServerCommand):
        self.command = command
        self.port = free_port()
        self._failed = False
        # -P: the supervisor must not import the files beside it.
        supervisor = [sys.executable, "-P", str(Path(__file__).with_name("supervisor.py"))]
        server = [*command.words, "--host", HOST, "--port", str(self.port)]
        environment = {**os.environ, "LLAMAFACTORY_KT_DISABLE": "1"}  # hooks are for LLaMA-Factory only
        with writing(Path(tempfile.gettempdir())):
            file = tempfile.NamedTemporaryFile(prefix="llamafactory-kt-sglang-", suffix=".log", delete=False)  # noqa: SIM115
        with file as log:
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
            KTServerError: The server ended, another program has its port, or the time is up; with the end of the log.
        """
        started = said = time.monotonic()
        with httpx.Client(base_url=self.url, timeout=10, trust_env=False) as client:
            while not self._answers(client):
                now = time.monotonic()
                if (status := self._process.poll()) is not None:
                    with socket.socket() as probe:
                        if probe.connect_ex((HOST, self.port)) == 0:
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
            if answer.status_code == 404:  # older servers
                answer = client.get("/get_model_info")
            found = answer.json().get("model_path")
        except (httpx.HTTPError, ValueError, AttributeError):
            return False
        if found != (own := self.command.parsed.model_path):
            raise _PortTaken(
                self._failure(f"Port {self.port} was taken by another server, which serves {found} instead of {own}")
            )
        return True

    def check(self) -> None:
        """Raise KTServerError, with the end of the log, if the server has ended or ends within two seconds."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            status = self._process.wait(timeout=2)
            raise KTServerError(self._failure(f"SGLang has ended with exit status {status}"))

    def _failure(self, what: str) -> str:
        self._failed = True
        lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines() if self.log.exists() else []
        shown = "\n".join(f"  {line}" for line in lines[-_LAST_LINES:]) or "  (nothing)"
        return f"{what}.\nThe end of its log, {self.log}:\n{shown}\nIts command was:\n{self.command}"

    def close(self) -> None:
        """End the server and wait for it. The log is removed unless an error has named it. Calling it again does nothing."""
        atexit.unregister(self.close)
        with contextlib.suppress(OSError):
            assert self._process.stdin is not None
            self._process.stdin.close()
        self._process.wait()
        if not self._failed:
            self.log.unlink(missing_ok=True)


def free_port() -> int:
    """A local TCP port that no program listens on."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port: int = probe.getsockname()[1]
        return port
