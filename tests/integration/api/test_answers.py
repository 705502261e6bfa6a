"""``llamafactory-cli api`` with the official ``openai`` client: answers, one at a time and many at once, and the server's end."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import psutil
import pytest
from helpers.api import ask, serving
from helpers.chats import EXPECTED, PROMPTS, config
from helpers.models import make_model

QUESTIONS = [*EXPECTED][:8]


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


def ends(process: subprocess.Popen, log: Path) -> None:
    """SIGTERM ends the server at once, without a word of complaint and with nothing left behind."""
    children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGTERM)
    status, text = process.wait(60), log.read_text()
    assert status in (0, -signal.SIGTERM), "uvicorn ends by the signal itself once everything is shut down"
    for word in ("Traceback", "terminate called", "Cancelled"):
        assert word not in text, text[-3000:]
    assert "Application shutdown complete" in text and not any(child.is_running() for child in children)


def test_one_worker(tmp_path, demo):
    """A model that goes on and on, one request at a time: who comes after one that left is answered; eight at once are all
    answered, as they are alone; and the end comes in the middle of two answers, one of which waits for the other."""
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
            return ask(client, str(number % 8), max_tokens=12).choices[0].message.content

        alone = [answer(number) for number in range(8)]
        with ThreadPoolExecutor(8) as clients:
            assert [*clients.map(answer, range(40))] == alone * 5 and len(set(alone)) == 8

        stream = ask(client, "one", stream=True, max_tokens=50_000)
        next(iter(stream))
        with ThreadPoolExecutor(1) as waiting:
            whole = waiting.submit(ask, client, "two", max_tokens=50_000)
            time.sleep(0.5)
            ends(process, log)
            with pytest.raises(openai.InternalServerError, match="The server is shutting down"):
                whole.result()
