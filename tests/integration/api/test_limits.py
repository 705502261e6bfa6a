"""What clients ask beyond a plain answer, and requests that are made to cost the server time or memory."""

from __future__ import annotations

import asyncio
import gzip
import io
import json
import random
import re
from types import SimpleNamespace

import openai
import pytest
from helpers.api import ask, client_of
from helpers.chats import chat_model
from helpers.image_text import picture
from test_attachments import data_url, file_of, read, web
from test_errors import broken

from llamafactory_kt.integration.api import requests
from llamafactory_kt.integration.api.attached import attachments
from llamafactory_kt.integration.api.errors import BadRequest

__all__ = ["web"]
TOOLS = [{"type": "function", "function": {"name": name}} for name in ("f", "g")]


@pytest.fixture(scope="module")
def chat(demo):
    return chat_model(demo / "model", kt_backend="torch")


@pytest.fixture
def client(chat):
    return client_of(chat)


def test_usage_of_a_stream(client):
    """It is what the whole answer reports, also where a stop string or the end of the text ends it."""
    for keys in ({"max_tokens": 5}, {"max_tokens": 200}, {"max_tokens": 200, "stop": "e"}):
        question = "Who are you, and who is it that made you? " * 2
        whole = ask(client, question, temperature=0, **keys)
        chunks = list(ask(client, question, temperature=0, stream=True, stream_options={"include_usage": True}, **keys))
        assert chunks[-1].choices == [] and all(chunk.usage is None for chunk in chunks[:-1])
        used, once_more = (usage.model_dump(exclude_none=True) for usage in (whole.usage, chunks[-1].usage))
        assert once_more.pop("prompt_tokens_details") == {"cached_tokens": used["prompt_tokens"] - 2}
        used.pop("prompt_tokens_details")
        assert once_more == used
        assert "".join(c.choices[0].delta.content or "" for c in chunks[:-1]) == whole.choices[0].message.content
        assert {(c.object, c.id, c.model) for c in chunks} == {("chat.completion.chunk", chunks[0].id, "any")}
        assert all(chunk.created > 10**9 for chunk in chunks), "strict clients demand it"


def test_several_streamed_answers(client):
    whole = ask(client, "Who?", temperature=0, max_tokens=6)
    one = whole.choices[0].message.content
    chunks = list(
        ask(client, "Who?", temperature=0, max_tokens=6, n=3, stream=True, stream_options={"include_usage": True})
    )
    texts = {index: "" for index in range(3)}
    ends = {}
    for chunk in chunks[:-1]:
        (choice,) = chunk.choices
        texts[choice.index] += choice.delta.content or ""
        if choice.finish_reason:
            ends[choice.index] = choice.finish_reason
    assert set(texts.values()) == {one} and ends == dict.fromkeys(range(3), "length")
    assert chunks[-1].usage.completion_tokens == 18 and chunks[-1].usage.prompt_tokens == whole.usage.prompt_tokens
    drawn = ask(client, "Who?", temperature=100, max_tokens=6, n=4, stream=True)
    texts = {}
    for chunk in drawn:
        texts.setdefault(chunk.choices[0].index, []).append(chunk.choices[0].delta.content or "")
    assert len({"".join(text) for text in texts.values()}) > 1


def test_the_openai_clients_own_accumulation_of_a_stream():
    chat = broken()
    from llamafactory.data.template import TEMPLATES

    chat.engine.template = TEMPLATES["qwen"]
    text = '<tool_call>\n{"name": "f", "arguments": {"a": "é"}}\n</tool_call>\n<tool_call>\n{"name": "g", "arguments": {}}\n</tool_call>'

    async def pieces(*args, **keys):
        for letter in text:
            yield letter

    chat.astream_chat = pieces
    with client_of(chat).chat.completions.stream(
        model="any", messages=[{"role": "user", "content": "x"}], tools=TOOLS
    ) as stream:
        for _ in stream:
            pass
        (choice,) = stream.get_final_completion().choices
    called = [(call.function.name, json.loads(call.function.arguments)) for call in choice.message.tool_calls]
    assert called == [("f", {"a": "é"}), ("g", {})] and choice.finish_reason == "tool_calls"


@pytest.mark.parametrize("arguments", ["3", "[1]", "null", '"x"'])
def test_a_call_that_the_client_could_not_send_back_is_text(arguments):
    from llamafactory.data.template import TEMPLATES

    chat, text = broken(), f'<tool_call>\n{{"name": "f", "arguments": {arguments}}}\n</tool_call>'
    chat.engine.template = TEMPLATES["qwen"]

    async def whole(*args, **keys):
        return [SimpleNamespace(response_text=text, response_length=1, prompt_length=1, finish_reason="stop")]

    chat.achat = whole
    (choice,) = ask(client_of(chat), "x", tools=TOOLS).choices
    assert choice.message.content == text and not choice.message.tool_calls and choice.finish_reason == "stop"


def test_one_tool_is_chosen(client):
    def prompt(**keys) -> int:
        return ask(client, "x", max_tokens=1, temperature=0, **keys).usage.prompt_tokens

    assert prompt(tools=TOOLS, tool_choice={"type": "function", "function": {"name": "g"}}) == prompt(tools=TOOLS[1:])
    assert prompt(tools=TOOLS) > prompt(tools=TOOLS[1:]) > prompt(tools=TOOLS, tool_choice="none")


@pytest.mark.parametrize(
    "keys",
    [
        {"seed": "x"}, {"logprobs": "yes"}, {"top_logprobs": 21}, {"user": 3}, {"metadata": 3}, {"frequency_penalty": 3},
        {"frequency_penalty": "x"}, {"logit_bias": {"5": "x"}}, {"response_format": "json"}, {"response_format": {"type": "xml"}},
        {"tool_choice": "any"}, {"tool_choice": {"type": "function", "function": {"name": "h"}}, "tools": TOOLS},
        {"stream_options": 3, "stream": True}, {"parallel_tool_calls": "x"},
        {"unknown": 1}, {"seed": 2**63}, {"logit_bias": {"-1": 1}}, {"logit_bias": {"1024": 1}},
        {"logit_bias": {"1": 101}}, {"presence_penalty": 2.1}, {"repetition_penalty": 0}, {"top_k": -1},
        {"response_format": {"type": "json_schema"}},
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "wrong"}}}},
        {"stop": ["a"] * 65}, {"stop": "a" * 5000}, {"model": "a" * 5000},
    ],
)  # fmt: skip
def test_values_that_are_refused(client, keys):
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(
            **{"model": "any", "messages": [{"role": "user", "content": "x"}], "max_tokens": 1, "extra_body": keys}
        )
    assert re.split("[.[]", caught.value.param)[0] in keys


BEGIN = b'{"model": "any", "max_tokens": 1, "messages": '


@pytest.mark.parametrize(
    "body",
    [
        BEGIN + b"[" + b"0," * 10**6 + b"0]}",
        BEGIN + b"[" + b"{}," * 10**6 + b"0]}",
        BEGIN + b'[{"role": "user", "content": [' + b"0," * 10**6 + b"0]}]}",
        BEGIN + b"[" + b'{"role": "user", "content": ""},' * 70_000 + b'{"role": "user", "content": ""}]}',
        BEGIN + b'[{"role": "user", "content": "' + b"a" * 4_000_000 + b'"}]}',
        BEGIN + b'[{"role": "user", "content": "x"}], "stop": [' + b"0," * 10**6 + b"0]}",
        BEGIN + b'[{"role": "user", "content": "x"}], "tools": [{"function": {"name": "f", "parameters": {"properties": {'
        + b",".join(b'"%d": 0' % number for number in range(200_000)) + b"}}}}]}",
    ],
)  # fmt: skip
@pytest.mark.timeout(60)
def test_millions_of_mistakes_are_one(client, body):
    """Each would be an object of a KiB: a body of 4 MiB took 5 GiB and held up the server for three minutes."""
    answer = client._client.post("/v1/chat/completions", content=body, headers={"content-type": "application/json"})
    error = answer.json()["error"]
    assert answer.status_code == 400 and error["message"].count(";") < 3 and len(answer.content) < 3000, error
    assert b"aaa" not in body or "cannot hold" in error["message"], "it is not tokenized"


def test_a_body_of_another_type(client):
    for headers in ({}, {"content-type": "text/plain"}):
        answer = client._client.post("/v1/chat/completions", content=BEGIN + b"[]}", headers=headers)
        assert (
            answer.status_code == 400 and "Content-Type must be application/json" in answer.json()["error"]["message"]
        )


def test_a_client_that_does_not_read_holds_up_nobody(monkeypatch):
    from llamafactory.api import app as module

    monkeypatch.setattr(requests, "SEND_SECONDS", 0.2)
    chat, sent, ended = broken(), [], []

    async def endless(*args, **keys):
        try:
            while True:
                yield "x"
                await asyncio.sleep(0)
        finally:
            ended.append(True)

    chat.astream_chat = endless
    app = module.create_app(chat)
    body = json.dumps({"model": "any", "messages": [{"role": "user", "content": "x"}], "stream": True}).encode()
    scope = {"type": "http", "method": "POST", "path": requests.PATH, "raw_path": b"", "query_string": b"", "root_path": "",
             "scheme": "http", "http_version": "1.1", "asgi": {"version": "3.0"}, "client": ("x", 1), "server": ("x", 1),
             "headers": [(b"content-type", b"application/json")]}  # fmt: skip
    given = iter([{"type": "http.request", "body": body, "more_body": False}])

    async def receive():
        if (message := next(given, None)) is not None:
            return message
        return await asyncio.Event().wait()

    async def send(message):
        sent.append(message["type"])
        if sent.count("http.response.body") > 3:
            await asyncio.Event().wait()  # a full buffer

    async def run():
        await asyncio.wait_for(app(scope, receive, send), 20)

    asyncio.run(run())
    assert ended == [True]


def test_compressed_downloads_stay_compressed(web, monkeypatch):
    """One step of a decoder may make gigabytes of a few KiB, more so with several encodings one in another."""
    stock = web.handler.do_GET

    def do_GET(self):
        assert self.headers["Accept-Encoding"] == "identity"
        if self.path != "/bomb":
            return stock(self)
        self.send_response(200)
        self.send_header("Content-Encoding", "gzip, gzip")
        self.end_headers()
        self.wfile.write(gzip.compress(gzip.compress(b"\0" * 10**7)))

    monkeypatch.setattr(web.handler, "do_GET", do_GET)
    monkeypatch.setattr(attachments, "MOST_BYTES", 10**5)
    with pytest.raises(BadRequest, match="it is no PNG"):
        read(f"{web.public}/bomb")
    assert read(f"{web.public}/picture").images


def test_a_jpeg_of_many_scans():
    file = io.BytesIO()
    picture().convert("RGB").save(file, "JPEG", progressive=True)
    good = file.getvalue()
    assert 2 < good.count(b"\xff\xda") < 20 and read(data_url(good, "image/jpeg")).images
    assert read(data_url(good + random.Random(0).randbytes(2**24), "image/jpeg")).images, "a film behind it"
    last = good.rindex(b"\xff\xda")
    many = good[:-2] + good[last:-2] * 200 + good[-2:]
    with pytest.raises(BadRequest, match="more than 100 scans"):
        read(data_url(many, "image/jpeg"))


@pytest.mark.parametrize("kind", ["GIF", "WEBP"])
def test_one_frame_of_an_animation(kind):
    file = io.BytesIO()
    picture().convert("RGB").save(
        file, kind, save_all=True, append_images=[picture(*picture().size, n).convert("RGB") for n in range(3)]
    )
    assert len(read(data_url(file.getvalue(), f"image/{kind.lower()}")).images) == 1


@pytest.mark.parametrize("size", [1, 20, 60, 200])
def test_pictures_that_were_cut_off(size):
    for kind in ("PNG", "JPEG", "GIF", "BMP", "WEBP"):
        with pytest.raises(BadRequest, match="cannot be read"):
            read(data_url(file_of(picture().convert("RGB"), kind)[:size]))
