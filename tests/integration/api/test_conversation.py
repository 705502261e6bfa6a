"""Conversations that OpenAI's API takes, in LLaMA-Factory's form: compared with its own converter of datasets and its own readers of
what models write."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
from llamafactory.data.converter import get_dataset_converter
from llamafactory.data.formatter import FunctionFormatter, StringFormatter, ToolFormatter
from llamafactory.data.parser import DatasetAttr
from llamafactory.data.template import TEMPLATES
from llamafactory.data.tool_utils import TOOLS

from llamafactory_kt.integration.api.conversation import read_conversation
from llamafactory_kt.integration.api.errors import BadRequest
from llamafactory_kt.integration.api.protocol.chat_request import ChatRequest


def call(name: str, arguments: str, number: int = 1) -> dict:
    return {"id": f"call_{number}", "type": "function", "function": {"name": name, "arguments": arguments}}


def says(role: str, content: str | None = None, **more) -> dict:
    return {"role": role, "content": content, **more}


ASKED = says("user", "Weather?")
CALLED = says("assistant", tool_calls=[call("weather", '{"city": "Paris"}'), call("weather", '{"city": "Rome"}', 2)])
RESULTS = [says("tool", "18 C", tool_call_id="call_1"), says("tool", "25 C", tool_call_id="call_2")]


def read(*messages: dict, template: str = "qwen", **keys) -> dict:
    request = ChatRequest.model_validate({"model": "any", "messages": list(messages), **keys})
    return read_conversation(request, TEMPLATES[template])


def turns(*messages: dict, **keys) -> list[tuple[str, str]]:
    return [(message["role"], message["content"]) for message in read(*messages, **keys)["messages"]]


def test_calls_and_their_results_are_those_of_a_dataset():
    """Apart from the arguments, which stand in a dataset as they are, an object or (from OpenAI's API) JSON in a string."""
    row = [
        ASKED,
        {
            **CALLED,
            "tool_calls": [
                {"function": {"name": "weather", "arguments": {"city": city}}} for city in ("Paris", "Rome")
            ],
        },
    ]
    attributes = DatasetAttr("file", dataset_name="x", messages="messages", formatting="openai")
    for name, tag in (("role_tag", "role"), ("content_tag", "content"), ("user_tag", "user"), ("assistant_tag", "assistant"),
                      ("system_tag", "system"), ("observation_tag", "tool"), ("function_tag", "function_call")):  # fmt: skip
        setattr(attributes, name, tag)
    converted = get_dataset_converter("openai", attributes, SimpleNamespace())(
        {"messages": [*row, *RESULTS, says("assistant", "ok")]}
    )
    assert read(ASKED, CALLED, *RESULTS)["messages"] == converted["_prompt"]
    assert [message["role"] for message in converted["_prompt"]] == ["user", "function", "observation"]


def test_results_stand_in_the_order_of_their_calls():
    """Whatever order they come in: a template writes no ids. Results of other calls stay as they are."""
    assert read(ASKED, CALLED, *reversed(RESULTS)) == read(ASKED, CALLED, *RESULTS)
    assert turns(ASKED, CALLED, RESULTS[1])[-1][1] == "25 C"
    others = [{**RESULTS[1], "tool_call_id": "call_3"}, RESULTS[0]]
    assert turns(ASKED, CALLED, *others)[-1][1].startswith("25 C")
    with pytest.raises(BadRequest, match=r"messages\[2\] has no content"):
        read(ASKED, CALLED, says("tool", None, tool_call_id="call_2"), RESULTS[0])


def test_results_stand_apart_as_the_template_marks_them():
    assert turns(*RESULTS)[-1][1] == "18 C\n</tool_response>\n<tool_response>\n25 C"
    assert turns(*RESULTS, template="minimax2")[-1][1] == "18 C</response>\n<response>25 C"
    assert turns(*RESULTS, template="deepseek")[-1][1] == "18 C\n25 C", "no marks"


@pytest.mark.parametrize(
    ("messages", "wanted"),
    [
        ([says("user", "a"), says("user", "b")], [("user", "a\nb")]),
        ([says("user", "a"), says("assistant", "b"), says("assistant", "c"), says("user", "d")],
         [("user", "a"), ("assistant", "b\nc"), ("user", "d")]),
        ([says("assistant", "Hello"), says("user", "a")], [("user", ""), ("assistant", "Hello"), ("user", "a")]),
        ([says("tool", "1"), says("user", "a")], [("observation", "1"), ("assistant", ""), ("user", "a")]),
        ([ASKED, CALLED, says("user", "a")], None),
        ([says("user", [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}])], [("user", "ab")]),
        ([says("user", "a"), says("assistant", "b", tool_calls=[]), says("user", "c")], [("user", "a"), ("assistant", "b"), ("user", "c")]),
    ],
)  # fmt: skip
def test_turns(messages, wanted):
    found = turns(*messages)
    assert wanted is None or found == wanted
    sides = [role in ("user", "observation") for role, _ in found]
    assert sides == [number % 2 == 0 for number in range(len(sides))] and sides[-1], "they take turns"


def test_system_messages():
    for role in ("system", "developer"):
        assert read(says(role, "Be brief."), ASKED)["system"] == "Be brief."
    several = read(says("system", "a"), says("developer", [{"type": "text", "text": "b"}]), ASKED, says("system", "c"))
    assert several["system"] == "a\nb\nc" and several["messages"] == [{"role": "user", "content": "Weather?"}]
    assert read(ASKED)["system"] is None


def test_arguments_that_are_no_object():
    for arguments in ("it", "3", "[]", "[" * 10_000, '{"a": '):
        with pytest.raises(ValueError, match="the arguments of the tool call look are not a JSON object"):
            read(says("assistant", tool_calls=[call("look", arguments)]), ASKED)
    assert turns(says("assistant", tool_calls=[call("look", "")]), ASKED)[1] == (
        "function",
        '[{"name": "look", "arguments": {}}]',
    )


def test_older_forms_of_calls():
    """OpenAI's single function_call with its result, and LLaMA-Factory's function message, which is the call."""
    function = {"name": "weather", "arguments": '{"city": "Paris"}'}
    found = turns(ASKED, says("assistant", function_call=function), says("function", "18 C", name="weather"))
    written = json.dumps([{"name": "weather", "arguments": {"city": "Paris"}}])
    assert found == [("user", "Weather?"), ("function", written), ("observation", "18 C")]
    assert turns(ASKED, says("function", json.dumps(json.loads(written)[0])), says("tool", "18 C")) == found
    for wrong in (
        "no JSON",
        "[]",
        "3",
        '[{"name": "f"}]',
        '{"name": 1, "arguments": {}}',
        '{"name": "f", "arguments": 1}',
        "[" * 10_000,
    ):
        with pytest.raises(BadRequest, match=r"messages\[1\]: a function message must be JSON"):
            turns(ASKED, says("function", wrong), ASKED)


NOT_READ_BACK = {"minimax2", "glm4_moe", "qwen3_5", "seed_oss", "gemma4", "lfm2"}
"""formats whose reader wants marks that the template puts around what the writer writes, or whose values are plain text"""
TRICKY = {"city": "</tool_call> x \"'", "days": 3, "units": ["C", None], "exact": True}


@pytest.mark.parametrize("tool_format", sorted(TOOLS))
def test_every_format_reads_what_it_is_made_to_write(tool_format):
    """A call goes through the template's writer and back through its reader; what the model said with it stays."""
    template = SimpleNamespace(
        format_function=FunctionFormatter(slots=["{{content}}"], tool_format=tool_format),
        format_tools=ToolFormatter(tool_format=tool_format),
        format_observation=StringFormatter(slots=["{{content}}"]),
        tool_call_words=("<tool_call>", "</tool_call>"),
    )
    marks = {"thought_words": ("<think>", "</think>"), "tool_call_words": template.tool_call_words}
    for text, arguments in ((None, TRICKY), ("Let me see.", TRICKY)):
        asked = [ASKED, says("assistant", text, tool_calls=[call("weather", json.dumps(arguments))]), RESULTS[0]]
        request = ChatRequest.model_validate({"model": "any", "messages": asked})
        message = read_conversation(request, template)["messages"][1]
        (written,) = template.format_function.apply(content=message["content"], **marks)
        assert written.startswith(text or "")
        if text is None and tool_format not in NOT_READ_BACK:
            ((name, read_back),) = template.format_tools.extract(written)
            assert (name, json.loads(read_back)) == ("weather", arguments)


PARAMETERS = [
    None, {}, {"type": "object"}, {"type": "object", "properties": {}},
    {"properties": {"n": {"type": "integer", "enum": [1, 2]}, "any": True, "either": {"type": ["string", "null"]}}},
    {"properties": {"n": {"anyOf": [{"type": "integer"}, {"type": "null"}], "default": None}}, "required": ["n"]},
    {"properties": {"list": {"type": "array", "items": {"type": "object", "properties": {"a": {"enum": [None, 1.5, "x"]}}}}}},
    {"properties": {"ref": {"$ref": "#/$defs/x"}}, "$defs": {"x": {"type": "string"}}, "additionalProperties": False},
]  # fmt: skip


@pytest.mark.parametrize("parameters", PARAMETERS)
@pytest.mark.parametrize("tool_format", sorted(TOOLS))
def test_every_format_can_describe_every_tool(tool_format, parameters):
    function = {"name": "look_up", **({} if parameters is None else {"parameters": parameters})}
    tools = [{"type": "function", "function": function}, {"function": {**function, "description": "Looks it up."}}]
    request = ChatRequest.model_validate({"model": "any", "messages": [ASKED], "tools": tools})
    template = SimpleNamespace(format_tools=ToolFormatter(tool_format=tool_format))
    written = read_conversation(request, template)["tools"]
    (described,) = template.format_tools.apply(content=written)
    assert "look_up" in described and "Looks it up." in described
    for name in (parameters or {}).get("properties", {}):
        assert name in described
    if tool_format == "qwen":
        assert json.loads(written) == [tool["function"] for tool in tools], "as the client has it"
    if (
        tool_format == "default"
        and parameters
        and "n" in parameters.get("properties", {})
        and "enum" in parameters["properties"]["n"]
    ):
        assert "n (integer): , should be one of [1, 2]" in described


def test_hidden_tools():
    tools = [{"function": {"name": name}} for name in "fgh"]

    def shown(choice) -> list[str]:
        return [tool["name"] for tool in json.loads(read(ASKED, tools=tools, tool_choice=choice)["tools"] or "[]")]

    def called(name: str) -> dict:
        return {"type": "function", "function": {"name": name}}

    assert (shown("auto"), shown("none"), shown(called("g"))) == (["f", "g", "h"], [], ["g"])
    for mode in ("auto", "required"):
        assert shown(
            {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": [called("h"), called("f")]}}
        ) == ["f", "h"]


def test_refusals_of_another_server():
    for refused in (says("assistant", refusal="No."), says("assistant", [{"type": "refusal", "refusal": "No."}])):
        assert turns(ASKED, refused, ASKED) == [("user", "Weather?"), ("assistant", "No."), ("user", "Weather?")]
    with pytest.raises(BadRequest, match="has no content"):
        turns(says("user", refusal="No."))
