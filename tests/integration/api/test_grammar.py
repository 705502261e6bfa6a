"""Answers that have to follow a JSON Schema, or to call a tool. The model is random: without the grammar it writes no JSON at all."""

from __future__ import annotations

import json

import openai
import pytest
import torch
from helpers.api import ask, client_of
from helpers.chats import chat_model
from helpers.models import make_model
from llamafactory.data.template import TEMPLATES

SCHEMA = {
    "type": "object",
    "properties": {
        "count": {"type": "integer", "minimum": 3, "maximum": 17},
        "color": {"enum": ["rot", "grün", "青"]},
        "parts": {"type": "array", "items": {"$ref": "#/$defs/part"}, "minItems": 1, "maxItems": 2},
    },
    "required": ["count", "color", "parts"],
    "additionalProperties": False,
    "$defs": {"part": {"type": "object", "properties": {"big": {"type": "boolean"}}, "required": ["big"], "additionalProperties": False}},
}  # fmt: skip
FORMAT = {"type": "json_schema", "json_schema": {"name": "thing", "strict": True, "schema": SCHEMA}}
WEATHER = {"type": "object", "properties": {"days": {"enum": [1, 2]}}, "required": ["days"], "additionalProperties": False}  # fmt: skip
TOOLS = [
    {"type": "function", "function": {"name": "weather", "parameters": WEATHER}},
    {"type": "function", "function": {"name": "stop_it", "parameters": {"type": "object", "properties": {}, "additionalProperties": False}}},
]  # fmt: skip
DRAWN = {"max_tokens": 150, "temperature": 1.0, "extra_body": {"do_sample": True}}


@pytest.fixture(scope="module")
def chat(tmp_path_factory):
    model = make_model(tmp_path_factory.mktemp("model"), "qwen3_moe", dtype=torch.float32, max_position_embeddings=2048)
    return chat_model(model, kt_backend="torch", infer_dtype="float32")


@pytest.fixture
def client(chat):
    return client_of(chat)


def check(text: str) -> None:
    found = json.loads(text)
    assert found.keys() == {"count", "color", "parts"} and 3 <= found["count"] <= 17
    assert found["color"] in ("rot", "grün", "青") and 1 <= len(found["parts"]) <= 2
    assert all(part.keys() == {"big"} and isinstance(part["big"], bool) for part in found["parts"])


def test_a_schema(client):
    answers = ask(client, "x", response_format=FORMAT, n=3, seed=1, **DRAWN)
    texts = [choice.message.content for choice in answers.choices]
    assert len(set(texts)) == 3 and {choice.finish_reason for choice in answers.choices} == {"stop"}
    for text in texts:
        check(text)
    chunks = list(ask(client, "x", response_format=FORMAT, seed=1, stream=True, **DRAWN))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == texts[0]
    check(ask(client, "x", response_format=FORMAT, temperature=0, max_tokens=300).choices[0].message.content)


def test_any_object(chat, client):
    """A random model writes strings without end; a bias for the quotation mark and the brace ends them."""
    ends = {str(chat.engine.tokenizer.convert_tokens_to_ids(sign)): 9 for sign in '"}'}
    answers = ask(client, "x", response_format={"type": "json_object"}, logit_bias=ends, seed=1, n=4, **DRAWN)
    found = [json.loads(choice.message.content) for choice in answers.choices if choice.finish_reason == "stop"]
    assert len(found) > 1 and all(isinstance(one, dict) for one in found)
    (text,) = ask(client, "x", response_format={"type": "text"}, max_tokens=3).choices
    assert text == ask(client, "x", max_tokens=3).choices[0]


def test_what_the_client_parses(client):
    """The openai client's own helper, with a class in place of a schema."""
    from pydantic import BaseModel

    class Point(BaseModel):
        x: bool
        label: None

    answer = client.chat.completions.parse(
        model="any", messages=[{"role": "user", "content": "x"}], response_format=Point, seed=2, **DRAWN
    )
    assert isinstance(answer.choices[0].message.parsed, Point)


@pytest.mark.parametrize("template", ["deepseek", "qwen", "llama3"])
def test_a_tool_must_be_called(chat, monkeypatch, template):
    monkeypatch.setattr(chat.engine.template, "format_function", TEMPLATES[template].format_function)
    monkeypatch.setattr(chat.engine.template, "format_tools", TEMPLATES[template].format_tools)
    client, called = client_of(chat), set()
    for choice in ask(client, "x", tools=TOOLS, tool_choice="required", seed=1, n=6, **DRAWN).choices:
        (call,) = choice.message.tool_calls
        assert choice.finish_reason == "tool_calls" and choice.message.content is None
        called.add(call.function.name)
        arguments = json.loads(call.function.arguments)
        assert arguments == {} if call.function.name == "stop_it" else arguments["days"] in (1, 2)
    assert called == {"weather", "stop_it"}
    named = {"type": "function", "function": {"name": "weather"}}
    with client.chat.completions.stream(
        model="any", messages=[{"role": "user", "content": "x"}], tools=TOOLS, tool_choice=named, seed=1, **DRAWN
    ) as stream:
        for _ in stream:
            pass
        (choice,) = stream.get_final_completion().choices
    assert [call.function.name for call in choice.message.tool_calls] == ["weather"]


@pytest.mark.parametrize("keys", [{"response_format": FORMAT}, {"tools": TOOLS, "tool_choice": "required"}])
def test_without_llguidance(client, monkeypatch, keys):
    from llamafactory_kt.integration.api import grammar

    monkeypatch.setattr(grammar, "is_installed", lambda: False)
    with pytest.raises(openai.BadRequestError, match="pip install llguidance") as caught:
        ask(client, "x", max_tokens=1, **keys)
    assert caught.value.param in keys


def test_a_template_with_calls_of_another_form(chat, monkeypatch):
    monkeypatch.setattr(chat.engine.template, "format_function", TEMPLATES["qwen3_5"].format_function)
    monkeypatch.setattr(chat.engine.template, "format_tools", TEMPLATES["qwen3_5"].format_tools)
    with pytest.raises(openai.BadRequestError, match="a form of its own"):
        ask(client_of(chat), "x", max_tokens=1, tools=TOOLS, tool_choice="required")


def nested(depth: int) -> dict:
    return {"type": "array", "items": nested(depth - 1)} if depth else {"type": "integer"}


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "wrong"}, {"not": {"type": "string"}}, {"oneOf": [{"type": "integer"}, {"type": "number"}]}, {"$ref": "#"},
        {"$ref": "http://127.0.0.1/schema"}, nested(300), {"enum": [f"x{number}" for number in range(100_000)]},
        {"type": "integer", "minimum": float("nan")}, {"anyOf": [{"type": "object", "properties": {f"p{j}": {"type": "integer"} for j in range(20)},
        "required": [f"p{i % 20}"], "title": str(i)} for i in range(2000)]},
    ],
)  # fmt: skip
def test_schemas_that_cannot_be_followed(client, schema):
    """Among them such as would take the server minutes or its memory."""
    body = {"model": "any", "messages": [{"role": "user", "content": "x"}], "max_tokens": 1,
            "response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}}  # fmt: skip
    answer = client._client.post(
        "/v1/chat/completions", content=json.dumps(body), headers={"content-type": "application/json"}
    )
    error = answer.json()["error"]
    assert answer.status_code == 400 and error["param"].startswith("response_format"), error
    assert len(error["message"]) < 2100
