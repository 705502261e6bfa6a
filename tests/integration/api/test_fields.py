"""Every field that the ``openai`` client can send, against ``llamafactory-cli api``: done, refused by its name, or without an effect."""

from __future__ import annotations

import json
import re

import httpx
import openai
import pytest
from helpers.api import ask
from helpers.chats import EXPECTED, PROMPTS
from helpers.places import ROOT
from openai.types import completion_create_params as texts
from openai.types.chat import completion_create_params as chats
from test_endpoints import figures

QUESTION, WITH, WITHOUT = PROMPTS[2], EXPECTED[PROMPTS[2]]["adapter"], EXPECTED[PROMPTS[2]]["base"]
FUNCTION = {"name": "f", "parameters": {"type": "object", "properties": {"a": {"enum": [1]}}, "required": ["a"], "additionalProperties": False}}  # fmt: skip
TOOL, OTHER = {"type": "function", "function": FUNCTION}, {"type": "function", "function": {"name": "g"}}
SCHEMA = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "object", "required": ["f"], "properties": {"f": {"const": 1}},
          "additionalProperties": False}}}  # fmt: skip
TWO = {"5": 100, "6": 99}
"""logit_bias: the token 5 says $, and 6 says %; without penalties the first is always the likeliest"""


def says(choice) -> str:
    return choice.text if hasattr(choice, "text") else choice.message.content


DONE = [
    ({"frequency_penalty": 2, "logit_bias": TWO}, lambda choice: {*says(choice)} == {*"$%"}),
    ({"presence_penalty": 2, "logit_bias": TWO}, lambda choice: {*says(choice)} == {*"$%"}),
    ({"logit_bias": {5: 100}}, lambda choice: {*says(choice)} == {"$"}),
    ({"max_tokens": 2}, lambda choice: choice.finish_reason == "length" and len(says(choice)) < len(WITH)),
    ({"temperature": 100, "seed": 3}, lambda choice: not WITH.startswith(says(choice)[:8])),
    ({"temperature": 100, "top_p": 1e-9}, lambda choice: {*says(choice)} == {"$"}),
    ({"stop": ["%", "$"]}, lambda choice: says(choice) == "" and choice.finish_reason == "stop"),
    ({"n": 2}, lambda choice: choice.index == 1),
]
CHAT_DONE = [
    ({"max_completion_tokens": 2}, lambda choice: choice.finish_reason == "length" and WITH.startswith(says(choice))),
    ({"logprobs": True, "top_logprobs": 2}, lambda choice: {len(one.top_logprobs) for one in choice.logprobs.content} == {2}),
    ({"response_format": SCHEMA}, lambda choice: json.loads(says(choice)) == {"f": 1}),
    ({"response_format": {"type": "json_object"}, "logit_bias": {}}, lambda choice: says(choice).startswith("{")),
    *(({"tools": [OTHER, TOOL], "tool_choice": chosen, "parallel_tool_calls": False},
       lambda choice: [(call.function.name, call.function.arguments.replace(" ", "")) for call in choice.message.tool_calls] == [("f", '{"a":1}')])
      for chosen in (TOOL | {"function": {"name": "f"}}, {"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [TOOL]}})),
]  # fmt: skip
TEXT_DONE = [({"logprobs": 2}, lambda choice: {len(top) for top in choice.logprobs.top_logprobs} == {2})]
NOTHING = [{"user": "u"}, {"stop": []}, {"logit_bias": {}}, {"n": 1}]
CHAT_NOTHING = [
    {"metadata": {"a": "b"}}, {"modalities": ["text"]}, {"parallel_tool_calls": True}, {"prediction": {"type": "content", "content": "x"}},
    {"prompt_cache_key": "k"}, {"prompt_cache_options": {"mode": "explicit", "ttl": "30m"}}, {"prompt_cache_retention": "24h"},
    {"response_format": {"type": "text"}}, {"safety_identifier": "s"}, {"service_tier": "auto"}, {"service_tier": "default"},
    {"store": False}, {"tool_choice": "auto"}, {"tool_choice": "none", "tools": [TOOL]}, {"max_tokens": 9, "max_completion_tokens": 9},
]  # fmt: skip
TEXT_NOTHING = [{"best_of": 1}, {"echo": False}, {"suffix": ""}]
"""fields that are refused, as clients send their defaults"""
REFUSED = [{"stream_options": {"include_usage": True}}, {"temperature": -1}, {"top_p": 2}, {"presence_penalty": 3}]
CHAT_REFUSED = [
    {"audio": {"voice": "alloy", "format": "wav"}}, {"function_call": "auto"}, {"functions": [FUNCTION]}, {"moderation": {"model": "x"}},
    {"reasoning_effort": "low"}, {"verbosity": "low"}, {"web_search_options": {}}, {"store": True}, {"service_tier": "flex"},
    {"modalities": ["text", "audio"]}, {"top_logprobs": 2}, {"max_tokens": 3, "max_completion_tokens": 2}, {"tool_choice": "required"},
    {"tools": [{"type": "custom", "custom": {"name": "c"}}]}, {"tools": [TOOL], "response_format": {"type": "json_object"}},
    {"tools": [TOOL], "tool_choice": {"type": "custom", "custom": {"name": "f"}}},
    {"tools": [TOOL], "tool_choice": {"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": [OTHER]}}},
    {"messages": [{"role": "user", "content": [{"type": "file", "file": {"file_id": "x"}}]}]},
]  # fmt: skip
TEXT_REFUSED = [{"best_of": 2}, {"echo": True}, {"suffix": "x"}, {"prompt": ["a", "b"]}, {"prompt": [1, 2]}]


@pytest.fixture
def client(server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server}/v1", api_key="none", max_retries=0, timeout=120)


def unknown(module, *known) -> list[dict]:
    """Fields of a newer client, which no row has."""
    named = {name for rows in known for row in rows for name in (row[0] if isinstance(row, tuple) else row)}
    fields = {*module.CompletionCreateParamsBase.__annotations__} - named - {"messages", "model", "prompt", "stream"}
    return [{"extra_body": {name: "x"}} for name in sorted(fields)]


@pytest.mark.parametrize("page", ["chat-guide.md", "chat-guide_zh.md"])
def test_the_guide_names_every_field(page):
    (section,) = re.findall(
        r"^## (?:The )?API\n(.*?)^## ", (ROOT / "docs" / page).read_text("utf-8"), re.MULTILINE | re.DOTALL
    )
    for module in (chats, texts):
        for name in module.CompletionCreateParamsBase.__annotations__:
            assert re.search(rf"`{name}\b", section), name


def chat(client, **keys):
    return client.chat.completions.create(
        **{"model": "any", "messages": [{"role": "user", "content": QUESTION}], "max_tokens": 9, **keys}
    )


def text(client, **keys):
    return client.completions.create(**{"model": "any", "prompt": QUESTION, "max_tokens": 9, **keys})


def shown(value) -> str:
    return (
        "+".join(value.get("extra_body", value)) if isinstance(value, dict) else value.__name__.replace("<lambda>", "")
    )


@pytest.mark.parametrize(
    ("create", "keys", "is_done"),
    [(chat, *row) for row in DONE + CHAT_DONE] + [(text, *row) for row in DONE + TEXT_DONE], ids=shown,
)  # fmt: skip
def test_fields_that_are_done(client, create, keys, is_done):
    if "logit_bias" not in keys and ("stop" in keys or "top_p" in keys):
        keys = {**keys, "logit_bias": TWO}
    if create is chat and ("tools" in keys or "response_format" in keys):
        keys = {**keys, "max_tokens": 80}
    if "max_completion_tokens" in keys:
        keys = {**keys, "max_tokens": openai.NOT_GIVEN}
    assert is_done(create(client, **keys).choices[-1])


@pytest.mark.parametrize("create", [chat, text])
def test_fields_without_an_effect(client, create):
    plain = create(client).choices[0]
    assert says(plain)
    for keys in NOTHING + (CHAT_NOTHING if create is chat else TEXT_NOTHING):
        assert create(client, **keys).choices == [plain], keys


@pytest.mark.parametrize(
    ("create", "keys"),
    [(chat, keys) for keys in REFUSED + CHAT_REFUSED + unknown(chats, REFUSED, CHAT_REFUSED, NOTHING, CHAT_NOTHING, DONE, CHAT_DONE)]
    + [(text, keys) for keys in REFUSED + TEXT_REFUSED + unknown(texts, REFUSED, TEXT_REFUSED, NOTHING, DONE, TEXT_DONE)], ids=shown,
)  # fmt: skip
def test_fields_that_are_refused_by_name(client, create, keys):
    for stream in (False, True):
        if "stream_options" in keys and stream:
            keys = {"stream_options": {"include_obfuscation": True}}
        with pytest.raises(openai.BadRequestError) as caught:
            create(client, **keys, stream=stream)
        named = caught.value.param.translate(str.maketrans(".[", "  ")).split()[0]
        assert named in {**keys, **keys.get("extra_body", {})} and named in caught.value.body["message"]
        assert caught.value.type == "invalid_request_error"


def test_names_choose_while_a_stream_runs(server, client):
    """The server's only adapter to choose is none, so that the model's own name means the one of the configuration."""
    assert [one.id for one in client.models.list()] == ["any", "plain"]
    with httpx.Client() as http:
        assert http.get(f"{server}/health").json() == {"status": "ok"}
    before = figures(client, server)
    stream = ask(client, QUESTION, stream=True, n=2, temperature=0, stream_options={"include_usage": True})
    chunks = [next(stream)]
    for name in ("plain", "any:plain"):
        assert says(ask(client, QUESTION, model=name).choices[0]) == WITHOUT
    *chunks, last = [*chunks, *stream]
    for index in range(2):
        assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices[0].index == index) == WITH
    for name in ("nobody", "any:", ":plain", "Plain", "any:any"):
        with pytest.raises(openai.NotFoundError, match="this server has 'any', 'plain'"):
            ask(client, QUESTION, model=name)
    after = figures(client, server)

    def counted(model: str) -> float:
        return after["generated_tokens_total", model] - before.get(("generated_tokens_total", model), 0)

    assert counted("any") == last.usage.completion_tokens > 0 < counted("plain")


def test_the_clients_other_ways_to_ask(client):
    keys = {
        "model": "any",
        "messages": [{"role": "developer", "content": "Be brief."}, *[{"role": "user", "content": "Hello"}] * 2],
    }
    raw = client.chat.completions.with_raw_response.create(**keys, max_tokens=4)
    plain = raw.parse().choices[0].message.content
    assert raw.http_response.headers["content-type"] == "application/json" and plain
    with client.chat.completions.with_streaming_response.create(**keys, max_tokens=4, stream=True) as response:
        lines = [line for line in response.iter_lines() if line]
    assert response.headers["content-type"].startswith("text/event-stream")
    assert all(line.startswith("data: ") for line in lines) and lines[-1] == "data: [DONE]", "and no comments between"
    with client.chat.completions.stream(**keys, max_tokens=40, response_format=SCHEMA, logprobs=True) as events:
        seen = {event.type for event in events}
    assert {"content.delta", "content.done", "logprobs.content.delta"} <= seen
    with client.chat.completions.stream(**keys, max_tokens=80, tools=[TOOL], tool_choice="required") as events:
        seen = {event.type for event in events}
        (call,) = events.get_final_completion().choices[0].message.tool_calls
    assert "tool_calls.function.arguments.done" in seen and call.function.name == "f"
    with pytest.raises(openai.LengthFinishReasonError):
        client.chat.completions.parse(**keys, max_tokens=1, response_format=SCHEMA)
    with pytest.raises(openai.APITimeoutError):
        client.with_options(timeout=0.001).chat.completions.create(**keys)
    assert client.chat.completions.create(**keys, max_tokens=4).choices[0].message.content == plain
