"""``llamafactory-cli api`` with the official ``openai`` client: what people build on it must hold."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import openai
import pytest
from conftest import KERNEL_PROBLEM
from test_chat import CLI, EXPECTED, PROMPTS, config
from tiny import make_model

ENGINE = "torch" if KERNEL_PROBLEM else "AMXBF16"
QUESTIONS = [*EXPECTED][:8]


@contextmanager
def serving(path: Path, log: Path, **environment: str) -> Iterator[tuple[str, subprocess.Popen]]:
    """(address, process) of a server that answers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
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


@pytest.fixture(scope="module")
def server(tmp_path_factory, demo) -> Iterator[str]:
    directory = tmp_path_factory.mktemp("server")
    keys = {"kt_backend": ENGINE, "kt_num_threads": None, "adapter_name_or_path": str(demo / "adapter")}
    with serving(config(directory, demo, **keys), directory / "log", MAX_CONCURRENT="4") as (address, _):
        yield address


@pytest.fixture
def client(server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server}/v1", api_key="none", max_retries=0, timeout=120)


def ask(client: openai.OpenAI, text: str, **keys):
    return client.chat.completions.create(model="any", messages=[{"role": "user", "content": text}], **keys)


def test_an_answer(client):
    answer = ask(client, PROMPTS[2])
    assert answer.choices[0].message.content == EXPECTED[PROMPTS[2]]["adapter"]
    assert answer.choices[0].finish_reason == "stop" and answer.usage.completion_tokens > 5
    cut = ask(client, PROMPTS[2], max_tokens=3)
    assert cut.choices[0].finish_reason == "length" and cut.usage.completion_tokens == 3
    # 0 is OpenAI's "none"; LLaMA-Factory alone takes it for a repetition penalty, which must be above 0
    assert ask(client, PROMPTS[2], presence_penalty=0).choices[0].message.content == EXPECTED[PROMPTS[2]]["adapter"]


@pytest.mark.parametrize(("keys", "reason"), [({}, "stop"), ({"max_tokens": 3}, "length")])
def test_a_stream(client, keys, reason):
    chunks = list(ask(client, PROMPTS[2], stream=True, **keys))
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    wanted = EXPECTED[PROMPTS[2]]["adapter"]
    assert text == wanted if reason == "stop" else wanted.startswith(text.strip()) and len(text) < len(wanted)
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None] * (len(chunks) - 1) + [reason]
    assert chunks[0].choices[0].delta.role == "assistant" and len({chunk.id for chunk in chunks}) == 1


@pytest.mark.parametrize("stream", [False, True])
def test_stop(client, stream):
    whole = EXPECTED[PROMPTS[2]]["adapter"]
    word = whole.split()[3]
    answer = ask(client, PROMPTS[2], stop=[word, "never"], stream=stream)
    if stream:
        chunks = list(answer)
        text, reason = "".join(c.choices[0].delta.content or "" for c in chunks), chunks[-1].choices[0].finish_reason
    else:
        text, reason = answer.choices[0].message.content, answer.choices[0].finish_reason
    assert text == whole[: whole.index(word)] and reason == "stop"


def test_eight_clients_at_once_get_what_they_get_alone(server, client):
    """Half of them stream. The server answers four at a time, the kernel one."""
    alone = [ask(client, question).choices[0].message.content for question in QUESTIONS]
    assert len(set(alone)) == len(QUESTIONS) == 8

    async def one(number: int, question: str) -> str:
        async with openai.AsyncOpenAI(base_url=f"{server}/v1", api_key="none", max_retries=0, timeout=120) as own:
            messages = [{"role": "user", "content": question}]
            if number % 2:
                stream = await own.chat.completions.create(model="any", messages=messages, stream=True)
                return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])
            answer = await own.chat.completions.create(model="any", messages=messages)
            return answer.choices[0].message.content

    async def everybody() -> list[str]:
        return await asyncio.gather(*(one(n, question) for n, question in enumerate(QUESTIONS)))

    assert asyncio.run(everybody()) == alone


MESSAGES = [{"role": "user", "content": "x"}]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("keys", "named"),
    [
        ({"messages": []}, "Invalid length"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "Invalid role"),
        ({"messages": MESSAGES * 2}, "Only supports u/a/u/a/u"),
        ({"messages": [{"role": "user", "content": None}]}, "messages[0] has no content"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0] has no content"),
        ({"max_tokens": 10**9}, "The model's context has 1024 tokens; the messages take"),
        ({"messages": [{"role": "user", "content": "word " * 3000}]}, "The model's context has 1024 tokens"),
        ({"max_tokens": -1}, "max_tokens: -1 is not 1 or more"),
        ({"temperature": -1, "top_p": 2}, "temperature: -1 is not 0 or more. top_p: 2 is not above 0"),
        ({"n": 0}, "n: 0 is not between 1 and 128"),
        ({"n": 10**6}, "n: 1e+06 is not between"),
        ({"presence_penalty": -1}, "presence_penalty: -1 is not"),
    ],
)
def test_bad_requests(client, keys, named, stream):
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(**{"model": "any", "messages": MESSAGES, "stream": stream, **keys})
    assert named in caught.value.response.json()["detail"]


def test_requests_that_are_no_requests(server, client):
    for body in (b"{", b'{"model": "\xff\xfe", "messages": []}', b"", b'{"model": "any"}', b"[1]", b'{"messages": 3}'):
        answer = httpx.post(f"{server}/v1/chat/completions", content=body, headers={"content-type": "application/json"})
        assert 400 <= answer.status_code < 500, (body, answer.text)
    assert ask(client, PROMPTS[2]).choices[0].message.content == EXPECTED[PROMPTS[2]]["adapter"]


def test_clients_that_go_away_and_the_end(tmp_path, demo):
    """A model that goes on and on, one request at a time: who comes after one that left is answered, and SIGTERM in the
    middle of a stream ends the server."""
    model = make_model(tmp_path / "model", "deepseek_v2", max_position_embeddings=100_000)
    path = config(tmp_path, demo, model_name_or_path=str(model), kt_backend="torch", kt_num_threads=None)
    log = tmp_path / "log"
    with serving(path, log, MAX_CONCURRENT="1") as (address, process):
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=120)
        for _ in range(3):
            stream = ask(client, "one", stream=True, max_tokens=50_000)
            for _ in zip(range(3), stream, strict=False):
                pass
            stream.close()
        assert ask(client, "two", max_tokens=3).usage.completion_tokens == 3
        stream = ask(client, "one", stream=True, max_tokens=50_000)
        next(iter(stream))
        process.send_signal(signal.SIGTERM)
        status = process.wait(120)
        text = log.read_text()
        assert status in (0, -signal.SIGTERM) and "Traceback" not in text and "terminate called" not in text, text[
            -3000:
        ]
        assert "Application shutdown complete" in text
