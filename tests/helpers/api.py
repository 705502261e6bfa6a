"""``llamafactory-cli api`` in a process of its own or its application in this one, and how to ask them."""

from __future__ import annotations

import os
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import openai

from .places import CLI


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@contextmanager
def serving(path: Path, log: Path, **environment: str) -> Iterator[tuple[str, subprocess.Popen]]:
    """Run a server until the block ends; gives its address and its process once it answers."""
    port = free_port()
    env = {**os.environ, "API_HOST": "127.0.0.1", "API_PORT": str(port), "API_VERBOSE": "0", **environment}
    with log.open("wb") as out:
        process = subprocess.Popen([CLI, "api", path], stdout=out, stderr=subprocess.STDOUT, env=env)
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(2000):
            assert process.poll() is None, log.read_text()
            try:
                httpx.get(f"{address}/v1/models")
                break
            except httpx.TransportError:
                time.sleep(0.2)
        else:
            raise AssertionError(f"no answer: {log.read_text()}")
        yield address, process
    finally:
        process.kill()
        process.wait()


@contextmanager
def serving_here(chat) -> Iterator[tuple[str, int]]:
    """A loaded chat's application behind uvicorn in a thread; gives its address."""
    import uvicorn
    from llamafactory.api import app as module

    server = uvicorn.Server(uvicorn.Config(module.create_app(chat), port=0, log_level="critical"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    try:
        yield server.servers[0].sockets[0].getsockname()
    finally:
        server.should_exit = True
        thread.join(10)


def client_of(chat) -> openai.OpenAI:
    """A client of a loaded chat's application, without a server."""
    from fastapi.testclient import TestClient
    from llamafactory.api import app as module

    return openai.OpenAI(
        base_url="http://testserver/v1", api_key="none", max_retries=0, http_client=TestClient(module.create_app(chat))
    )


def ask(client: openai.OpenAI, text: str, *, model: str = "any", **keys):
    return client.chat.completions.create(model=model, messages=[{"role": "user", "content": text}], **keys)
