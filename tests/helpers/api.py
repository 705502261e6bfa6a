"""``llamafactory-cli api`` in a process of its own, and how to ask it."""

from __future__ import annotations

import os
import socket
import subprocess
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
        for _ in range(600):
            assert process.poll() is None, log.read_text()
            try:
                httpx.get(f"{address}/v1/models")
                break
            except httpx.TransportError:
                time.sleep(0.2)
        yield address, process
    finally:
        process.kill()
        process.wait()


def ask(client: openai.OpenAI, text: str, **keys):
    return client.chat.completions.create(model="any", messages=[{"role": "user", "content": text}], **keys)
