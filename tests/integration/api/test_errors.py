"""Errors while an answer is generated."""

from __future__ import annotations

from types import SimpleNamespace

import openai
import pytest
from helpers.api import ask, client_of, serving_here

from llamafactory_kt.model.state import set_kt_state


def broken():
    """A chat whose engine breaks in the middle of an answer, which a model itself cannot be made to do."""

    class Broken:
        async def astream_chat(self, *args, **kwargs):
            yield "one"
            raise RuntimeError("broken on purpose")

        async def achat(self, *args, **kwargs):
            raise RuntimeError("broken on purpose")

        class engine:
            can_generate, name, processor, tokenizer, generating_args, template = True, None, None, None, None, None
            model = SimpleNamespace(
                config=SimpleNamespace(get_text_config=lambda: SimpleNamespace(max_position_embeddings=9))
            )

            @staticmethod
            def _process_args(**given):
                return {}, 1

    set_kt_state(Broken.engine.model, SimpleNamespace())
    return Broken()


def test_what_goes_wrong_while_generating():
    client = client_of(broken())
    with pytest.raises(openai.InternalServerError, match="RuntimeError: broken on purpose"):
        ask(client, "x")
    texts = []
    with pytest.raises(openai.APIError, match="RuntimeError: broken on purpose"):
        for chunk in ask(client, "x", stream=True):
            texts.append(chunk.choices[0].delta.content)
    assert texts == ["", "one"]


def test_the_next_request_on_a_connection_after_an_error():
    """Starlette alone raises an error again after its answer, and uvicorn then closes the connection under the next request."""
    import http.client
    import json
    import time

    body = json.dumps({"model": "any", "messages": [{"role": "user", "content": "x"}]})
    with serving_here(broken()) as address:
        connection = http.client.HTTPConnection(*address)
        connection.connect()
        own = connection.sock
        for _ in range(3):
            connection.request(
                "POST", "/v1/chat/completions", body, {"Content-Type": "application/json", "Origin": "http://x"}
            )
            answer = connection.getresponse()
            assert answer.status == 500 and b"broken on purpose" in answer.read()
            assert answer.getheader("access-control-allow-origin"), "a page in a browser may read it"
            time.sleep(0.05)
            connection.request("GET", "/v1/models")
            assert connection.getresponse().read().startswith(b'{"object":"list"')
        assert connection.sock is own, "one connection all the time"


def test_a_body_that_is_too_large(monkeypatch):
    from fastapi.testclient import TestClient
    from llamafactory.api import app as module

    from llamafactory_kt.integration.api import disconnect

    monkeypatch.setattr(disconnect, "MOST_BYTES", 2**20)
    client = TestClient(module.create_app(broken()))
    for content in (b"x" * (2**20 + 1), iter([b"x" * 2**19] * 3)):
        answer = client.post("/v1/chat/completions", content=content)
        assert answer.status_code == 400 and answer.json()["error"]["message"] == "The request is larger than 1 MiB."
    assert client.get("/v1/models").status_code == 200


def test_a_stream_with_tools():
    """Calls come as the openai client puts them together, text as text, and what is almost a call too."""
    from llamafactory.data.template import TEMPLATES

    tools = [{"type": "function", "function": {"name": "f"}}]
    calls = [
        '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>',
        '<tool_call>\n{"name": "g", "arguments": {}}\n</tool_call>',
    ]
    for text, wanted, reason in (
        ("\n".join(calls), [("f", '{"a": 1}'), ("g", "{}")], "tool_calls"),
        ("Just text.", None, "length"),
        ('<tool_call>{"name": 1, "arguments": 2}</tool_call>', None, "length"),
        ("<tool_call>3</tool_call>", None, "length"),
    ):
        chat = broken()
        chat.engine.template = TEMPLATES["qwen"]

        async def pieces(*args, text=text, **keys):
            for start in range(0, len(text), 7):
                yield text[start : start + 7]

        async def whole(*args, text=text, **keys):
            return [SimpleNamespace(response_text=text, response_length=1, prompt_length=1, finish_reason="length")]

        chat.astream_chat, chat.achat = pieces, whole
        client = client_of(chat)
        if wanted:  # the client refuses to put together what the length limit has cut
            with client.chat.completions.stream(
                model="any", messages=[{"role": "user", "content": "x"}], tools=tools
            ) as events:
                message = events.until_done().get_final_completion().choices[0].message
            assert [(call.function.name, call.function.arguments) for call in message.tool_calls] == wanted
        chunks = [chunk.choices[0] for chunk in ask(client, "x", stream=True, tools=tools)]
        assert chunks[-1].finish_reason == reason and chunks[0].delta.role == "assistant"
        streamed = [call for chunk in chunks for call in chunk.delta.tool_calls or ()]
        message = ask(client, "x", tools=tools).choices[0].message
        if wanted is None:
            assert "".join(chunk.delta.content or "" for chunk in chunks) == message.content == text and not streamed
            continue
        assert [(call.index, call.type) for call in streamed] == [(n, "function") for n in range(len(wanted))]
        for found in (streamed, message.tool_calls):
            assert [(call.function.name, call.function.arguments) for call in found] == wanted
            assert len({call.id for call in found}) == len(wanted)
        (only,) = ask(client, "x", tools=tools, parallel_tool_calls=False).choices[0].message.tool_calls
        assert only.function.name == "f"


def test_errors_in_a_stream_end_it():
    """Also those for which the conversation is to blame, and which only the engine finds."""
    from llamafactory_kt import KTDataError

    chat = broken()

    async def refused(*args, **keys):
        yield "one"
        raise KTDataError("A picture is missing.")

    chat.astream_chat = refused
    with pytest.raises(openai.APIError, match="A picture is missing") as caught:
        list(ask(client_of(chat), "x", stream=True))
    assert caught.value.type == "invalid_request_error"


def test_other_models_have_the_stock_application():
    from fastapi.testclient import TestClient
    from llamafactory.api import app as module

    chat = broken()
    chat.engine.model = SimpleNamespace(config=None)
    stock = TestClient(module.create_app(chat)).post(
        "/v1/chat/completions", json={"model": "any", "messages": [], "n": None}
    )
    assert stock.status_code == 422 and "detail" in stock.json()
