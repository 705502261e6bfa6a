"""``llamafactory-cli api`` with the official ``openai`` client."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import openai
import psutil
import pytest
from helpers.api import ask, serving
from helpers.chats import EXPECTED, PROMPTS, config
from helpers.models import make_model
from test_endpoints import figures


@pytest.fixture
def client(server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server}/v1", api_key="none", max_retries=0, timeout=120)


QUESTIONS = [*EXPECTED][:8]


def test_an_answer(client):
    answer = ask(client, PROMPTS[2])
    assert answer.choices[0].message.content == EXPECTED[PROMPTS[2]]["adapter"]
    assert answer.choices[0].finish_reason == "stop" and answer.usage.completion_tokens > 5
    cut = ask(client, PROMPTS[2], max_tokens=3)
    assert cut.choices[0].finish_reason == "length" and cut.usage.completion_tokens == 3
    # LLaMA-Factory alone takes it for a repetition penalty, which must be above 0
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
    """Half of them stream. The server handles four requests at a time, the kernel one."""
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


def ends(process: subprocess.Popen, log: Path) -> None:
    """SIGTERM ends the server at once, without complaints and without leaving anything behind."""
    children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGTERM)
    status, text = process.wait(60), log.read_text()
    assert status in (0, -signal.SIGTERM), "uvicorn ends by the signal itself once everything is shut down"
    for word in ("Traceback", "terminate called", "Cancelled"):
        assert word not in text, text[-3000:]
    assert "Application shutdown complete" in text and not any(child.is_running() for child in children)


def test_one_worker(tmp_path, demo):
    """A model whose answers never end, one request at a time. A client that comes after one that left gets its answer;
    eight at once get the answers they get alone; and the server ends during two answers, one of which waits for the
    other."""
    model = make_model(tmp_path / "model", "deepseek_v2", max_position_embeddings=100_000)
    path = config(tmp_path, demo, model_name_or_path=str(model), kt_backend="torch", kt_num_threads=None)
    log = tmp_path / "log"
    with serving(path, log, MAX_CONCURRENT="1") as (address, process):
        listening = [c for c in psutil.Process(process.pid).net_connections() if c.status == psutil.CONN_LISTEN]
        assert [f"http://{c.laddr.ip}:{c.laddr.port}" for c in listening] == [address], "nothing else listens"
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=120)
        for _ in range(3):
            stream = ask(client, "one", stream=True, max_tokens=50_000)
            for _ in zip(range(3), stream, strict=False):
                pass
            stream.close()
        with pytest.raises(openai.APITimeoutError):
            ask(client, "one", max_tokens=50_000, timeout=1)
        assert ask(client, "two", max_tokens=3).usage.completion_tokens == 3

        def answer(number: int) -> str:
            return ask(client, str(number % 8), max_tokens=6).choices[0].message.content

        alone = [answer(number) for number in range(8)]
        assert figures(client, address)["requests_total", "/v1/chat/completions", "499"] == 1, "of those, no stream"
        with ThreadPoolExecutor(8) as clients:
            assert [*clients.map(answer, range(16))] == alone * 2 and len(set(alone)) == 8

        stream = ask(client, "one", stream=True, max_tokens=50_000)
        next(iter(stream))
        with ThreadPoolExecutor(1) as waiting:
            whole = waiting.submit(ask, client, "two", max_tokens=50_000)
            while not figures(client, address)["waiting_requests",]:
                time.sleep(0.05)
            ends(process, log)
            with pytest.raises(openai.InternalServerError, match="The server is shutting down"):
                whole.result()


MESSAGES = [{"role": "user", "content": "x"}]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("keys", "named"),
    [
        ({"messages": []}, "Invalid length"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "Invalid role"),
        ({"messages": [*MESSAGES, {"role": "assistant", "content": "x"}]}, "Invalid role"),
        ({"messages": [{"role": "system", "content": "x"}]}, "Invalid role"),
        ({"messages": [{"role": "user", "content": None}]}, "messages[0] has no content"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0] has no content"),
        ({"max_tokens": 10**9}, "The model's context has 1024 tokens; the messages take"),
        ({"messages": [{"role": "user", "content": "word " * 3000}]}, "The model's context has 1024 tokens"),
        ({"max_tokens": -1}, "max_tokens: -1 is not 1 or more"),
        ({"max_tokens": -(10**400)}, "max_tokens: -1000"),
        (
            {"temperature": -1, "top_p": 2},
            "temperature: -1.0 is not 0 or more, up to 100, and not closer to 0 than 1e-20. top_p: 2.0 is not between 0 and 1",
        ),
        ({"n": 0}, "n: 0 is not between 1 and 128"),
        ({"n": 10**6}, "n: 1000000 is not between"),
        ({"presence_penalty": -3}, "presence_penalty: -3.0 is not"),
    ],
)
def test_bad_requests(client, keys, named, stream):
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(**{"model": "any", "messages": MESSAGES, "stream": stream, **keys})
    assert named in caught.value.body["message"]
    assert caught.value.param in {None, *keys} and caught.value.type == "invalid_request_error"
    assert (caught.value.code == "context_length_exceeded") == ("context" in named)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"{", "body: JSON decode error"),
        (b'{"model": "\xff\xfe", "messages": []}', "error parsing the body"),
        (b'{"model": "any", "messages": [{"role": "user", "content": "\\ud800"}]}', "not Unicode"),
        (b'{"model": "any", "messages": [{"role": "user", "content": "x"}], "temperature": NaN}', "temperature: nan"),
        (b"[" * 100_000, "error parsing the body"),
        (b"", "Field required"),
        (b'{"model": "any"}', "messages: Field required"),
        (b"[1]", "body: "),
        (b'{"messages": 3}', "model: Field required; messages: Input should be a valid list"),
    ],
)
def test_requests_that_are_no_requests(server, client, content, said):
    answer = httpx.post(f"{server}/v1/chat/completions", content=content, headers={"content-type": "application/json"})
    error = answer.json()["error"]
    assert answer.status_code == 400 and said in error["message"], answer.text
    assert error["type"] == "invalid_request_error" and error.keys() == {"message", "type", "param", "code"}


def test_the_server_lives(server, client):
    """It still answers after all these requests, also about a model that does not exist."""
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("none")
    assert "'none' does not exist" in caught.value.body["message"]
    assert ask(client, PROMPTS[2]).choices[0].message.content == EXPECTED[PROMPTS[2]]["adapter"]
