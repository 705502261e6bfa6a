"""Whatever a request holds, the answer is 200 or, in the form of OpenAI's API, 400; and the next request is answered as ever.

The bodies are made from good ones, by putting something else into each place of them. ``LLAMAFACTORY_KT_BODIES`` is how many are sent.
"""

from __future__ import annotations

import copy
import json
import os
import random
from collections.abc import Iterator
from typing import Any

import pytest
from fastapi.testclient import TestClient
from helpers.chats import chat_model
from helpers.image_text import make_image_text_model

SEED, GATE = 26, 90
TURN = {"role": "user", "content": "Hello, who are you?"}
CALL = {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
SCHEMA = {"type": "object", "properties": {"a": {"type": "integer", "enum": [1, 2]}}, "required": ["a"]}
PIXEL = "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
GOOD: list[dict[str, Any]] = [
    {"model": "any", "messages": [{"role": "developer", "content": "Be brief."}, TURN, TURN], "max_tokens": 2, "temperature": 0.7,
     "top_p": 0.9, "n": 1, "presence_penalty": 1.1, "stop": ["x", "y"], "stream": False, "do_sample": True, "seed": 3,
     "frequency_penalty": 0.5, "logit_bias": {"5": -1}, "logprobs": True, "top_logprobs": 2, "parallel_tool_calls": False,
     "response_format": {"type": "json_schema", "json_schema": {"name": "s", "schema": SCHEMA}}},
    {"model": "any", "messages": [TURN], "max_completion_tokens": 2, "stream": True, "tool_choice": "auto",
     "tools": [{"type": "function", "function": {"name": "f", "description": "d", "parameters": SCHEMA}}]},
    {"model": "any", "messages": [TURN], "max_tokens": 2, "tool_choice": "required",
     "tools": [{"type": "function", "function": {"name": "f", "parameters": SCHEMA}}]},
    {"model": "any", "max_tokens": 2, "messages": [
        TURN, {"role": "assistant", "content": None, "tool_calls": [CALL]}, {"role": "tool", "tool_call_id": "call_1", "content": "1"},
        {"role": "assistant", "content": None, "function_call": CALL["function"]}, {"role": "function", "name": "f", "content": "1"},
        {"role": "assistant", "content": "ok"}, {"role": "function", "content": '{"name": "f", "arguments": {}}'}, TURN]},
    {"model": "any", "max_tokens": 2, "messages": [{"role": "user", "content": [
        {"type": "text", "text": "What is it?"}, {"type": "image_url", "image_url": {"url": PIXEL}},
        {"type": "video_url", "video_url": {"url": "data:video/mp4;base64,AAAA"}}, {"type": "audio_url", "audio_url": {"url": "x"}}]}]},
]  # fmt: skip


def nested(depth: int) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = [value]
    return value


OTHERS: list[Any] = [
    None, "", "x", "null", 0, 1, -1, 3.5, 1e-300, 1e300, 10**30, True, False, [], {}, [[]], [None], {"a": 1}, {"type": "text"}, [TURN],
    "\ud800", "\x00\x1b[2J", "x" * 5000, "data:image/png;base64,!!", "file:///etc/passwd", "/etc/passwd", "http://127.0.0.1/", "http://[",
    float("nan"), float("inf"), nested(300), '[{"name": 1}]', "<image>",
]  # fmt: skip


def places(value: Any, path: tuple = ()) -> Iterator[tuple]:
    """The paths of everything in a body."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, one in inner:
        yield (*path, key)
        yield from places(one, (*path, key))


def bodies() -> list[dict[str, Any]]:
    """Every good body with every place removed, doubled, or replaced by each of the others."""
    made = []
    for good in GOOD:
        for path in places(good):
            for change in (*range(len(OTHERS)), "remove", "double"):
                body = copy.deepcopy(good)
                parent: Any = body
                for key in path[:-1]:
                    parent = parent[key]
                if change == "remove":
                    del parent[path[-1]]
                elif change == "double":
                    parent[path[-1]] = [parent[path[-1]]] * 2
                else:
                    parent[path[-1]] = OTHERS[change]
                made.append(body)
    return made


def sends(chat: Any, count: int) -> None:
    from llamafactory.api.app import create_app

    everything = bodies()
    print(f"{len(everything)} bodies, seed {SEED}")
    chosen = random.Random(SEED).sample(everything, min(count, len(everything)))
    client = TestClient(create_app(chat))  # raises what the server raises
    plain = {"model": "any", "messages": [TURN], "max_tokens": 4, "temperature": 0}

    def answer() -> str:
        return client.post("/v1/chat/completions", json=plain).json()["choices"][0]["message"]["content"]

    before, statuses = answer(), []
    for body in chosen:
        got = client.post(
            "/v1/chat/completions", content=json.dumps(body).encode(), headers={"content-type": "application/json"}
        )
        sent = json.dumps(body)[:2000]
        assert got.status_code in (200, 400), (sent, got.text)
        statuses.append(got.status_code)
        if got.status_code == 400:
            error = got.json()["error"]
            assert error.keys() == {"message", "type", "param", "code"} and error["message"], (sent, got.text)
            assert error["type"] == "invalid_request_error" and len(got.content) < 10_000, (sent, got.text)
        elif "event-stream" in got.headers["content-type"]:
            assert '"error"' not in got.text and got.text.strip().endswith("[DONE]"), (sent, got.text)
        else:
            assert got.json()["choices"], (sent, got.text)
    assert answer() == before and {200, 400} == set(statuses)


def count(fallback: int) -> int:
    return int(os.environ.get("LLAMAFACTORY_KT_BODIES", fallback))


def test_some_bodies(demo):
    sends(chat_model(demo / "model", kt_backend="torch"), count(GATE))


@pytest.mark.nightly
def test_all_bodies(demo):
    sends(chat_model(demo / "model", kt_backend="torch"), count(10**6))


@pytest.mark.nightly
def test_all_bodies_for_an_image_text_model(tmp_path):
    model = make_image_text_model(tmp_path, "qwen3_vl_moe")
    sends(chat_model(model, kt_backend="torch", template="qwen3_vl_nothink"), count(10**6))
