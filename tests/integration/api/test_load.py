"""The server under mixed load: eight clients with whole answers, streams, tools, pictures, clients that leave, bad bodies, and another
adapter now and then. No answer is wrong or lost, and memory stays flat.

``LLAMAFACTORY_KT_LOAD_SECONDS`` sets the length; measurements are printed (``-rP``).
"""

from __future__ import annotations

import base64
import contextlib
import io
import json
import os
import random
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
import pytest
from helpers.adapters import make_adapter
from helpers.api import free_port
from helpers.image_text import make_image_text_model, picture

SECONDS = float(os.environ.get("LLAMAFACTORY_KT_LOAD_SECONDS", "120"))
CLIENTS, SEED = 8, 26
MOST_GROWTH = 2 * 2**20
"""bytes a thousand requests, in a run that is long enough to tell"""
SERVER = """
import sys, threading
import torch
from llamafactory.api import app
from llamafactory_kt import switch_adapter

stock, chats, switched = app.create_app, [], sys.argv.pop()
app.create_app = lambda chat: chats.append(chat) or stock(chat)

def obey():
    for line in sys.stdin:
        switch_adapter(chats[0].engine.model, line.strip() or None)
        with open(switched, "a") as file:
            file.write(".")

threading.Thread(target=obey, daemon=True).start()
app.run_api()
"""
"""``llamafactory-cli api``, but for a thread that exchanges the adapter"""


def data_url(shown: Any) -> str:
    file = io.BytesIO()
    shown.save(file, "png")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


PICTURES = [data_url(picture(64, 48)), data_url(picture(48, 64, 1))]
TOOLS = [
    {"type": "function", "function": {"name": "look_up", "parameters": {"properties": {"what": {"enum": [1, 2]}}}}}
]


def content(number: int) -> Any:
    if number % 3:
        return f"Question {number}?"
    return [
        {"type": "text", "text": "What is it?"},
        {"type": "image_url", "image_url": {"url": PICTURES[number // 3 % 2]}},
    ]


GOOD = [
    {"model": "any", "max_tokens": 6 + number % 3, "messages": [{"role": "user", "content": content(number)}],
     "stream": number % 2 == 0, **({"tools": TOOLS} if number % 4 == 1 else {})}
    for number in range(12)
]  # fmt: skip
BAD = [
    {"model": "any", "messages": []},
    {"model": "any", "messages": [{"role": "user", "content": "x"}], "temperature": 1e-300},
    {"model": "any", "messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}]}]},
    {"model": "any", "messages": [{"role": "user", "content": "x"}], "tools": [{"type": "function"}], "stream": True},
]  # fmt: skip


def text_of(body: dict, answer: httpx.Response) -> str:
    if not body["stream"]:
        return answer.json()["choices"][0]["message"]["content"]
    events = [line.removeprefix("data: ") for line in answer.text.splitlines() if line.startswith("data: ")]
    assert events.pop() == "[DONE]", answer.text
    return "".join(json.loads(event)["choices"][0]["delta"].get("content") or "" for event in events)


@contextlib.contextmanager
def served(model: Path, log: Path) -> Iterator[tuple[str, subprocess.Popen]]:
    port = free_port()
    env = {
        **os.environ,
        "API_VERBOSE": "0",
        "MAX_CONCURRENT": "2",
        "API_PORT": str(port),
        "LLAMAFACTORY_VERBOSITY": "WARN",
    }
    keys = {
        "model_name_or_path": str(model),
        "template": "qwen3_vl_nothink",
        "use_kt": True,
        "kt_backend": "torch",
        "do_sample": False,
    }
    (path := log.with_name("api.yaml")).write_text(json.dumps(keys))
    command = [sys.executable, "-c", SERVER, path, log.with_name("switched")]
    with log.open("wb") as file:
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=file, stderr=file, env=env, text=True)
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(600):
            assert process.poll() is None, log.read_text()
            with contextlib.suppress(httpx.TransportError):
                httpx.get(f"{address}/v1/models")
                break
            time.sleep(0.2)
        yield address, process
    finally:
        process.kill()
        process.wait()


@pytest.mark.nightly
@pytest.mark.timeout(0)
def test_mixed_load(tmp_path):
    model = make_image_text_model(tmp_path / "model", "qwen3_vl_moe")
    adapter, switched, switches = make_adapter(tmp_path / "adapter", model), tmp_path / "switched", 0
    with served(model, tmp_path / "log") as (address, process):
        url = f"{address}/v1/chat/completions"

        def switch(to: str) -> None:
            nonlocal switches
            switches += 1
            process.stdin.write(f"{to}\n")
            process.stdin.flush()
            while not switched.exists() or len(switched.read_text()) < switches:
                assert process.poll() is None, (tmp_path / "log").read_text()
                time.sleep(0.05)

        right: list[set[str]] = [set() for _ in GOOD]
        for to in ("", str(adapter)):
            switch(to)
            for body, known in zip(GOOD, right, strict=True):
                known.add(text_of(body, httpx.post(url, json=body, timeout=60)))
        assert all(len(known) == 2 for known in right), "the adapter changes every answer"

        done: Counter[str] = Counter()
        wrong: list[str] = []
        end = time.monotonic() + SECONDS

        def ask(number: int) -> None:
            chance = random.Random(SEED + number)
            with httpx.Client(timeout=120) as client:
                while time.monotonic() < end and not wrong:
                    try:
                        done[one(client, chance)] += 1
                    except Exception as error:
                        wrong.append(f"{type(error).__name__}: {error}")

        def one(client: httpx.Client, chance: random.Random) -> str:
            kind = chance.random()
            if kind < 0.2:
                answer = client.post(url, json=chance.choice(BAD))
                assert answer.status_code == 400 and answer.json()["error"]["message"], answer.text
                return "bad"
            index = chance.randrange(len(GOOD))
            if kind < 0.35:  # leaves in the middle
                with client.stream("POST", url, json={**GOOD[index], "stream": True, "max_tokens": 200}) as answer:
                    next(answer.iter_lines())
                return "left"
            answer = client.post(url, json=GOOD[index])
            assert answer.status_code == 200, answer.text
            assert text_of(GOOD[index], answer) in right[index], (index, answer.text)
            return "stream" if GOOD[index]["stream"] else "whole"

        clients = [threading.Thread(target=ask, args=(number,)) for number in range(CLIENTS)]
        for client in clients:
            client.start()
        server, points = psutil.Process(process.pid), []
        while any(client.is_alive() for client in clients):
            time.sleep(min(2.0, SECONDS / 40))
            points.append((done.total(), server.memory_info().rss))
            if len(points) % 5 == 0:
                switch(str(adapter) if switches % 2 else "")
        assert not wrong, wrong
        points = points[len(points) // 4 :]
        growth = 1000 * float(np.polyfit(*np.array(points, dtype=float).T, 1)[0])
        print(f"{dict(done)}, {switches} switches, seed {SEED}, resident {points[0][1] / 2**20:.0f} to {points[-1][1] / 2**20:.0f} MiB, "
              f"{growth / 2**20:+.2f} MiB a thousand requests")  # fmt: skip
        assert (done.total() < 5000 or growth < MOST_GROWTH) and done["whole"] and done["stream"] and switches > 2
        log = (tmp_path / "log").read_text()
        assert "Traceback" not in log, log[-3000:]
