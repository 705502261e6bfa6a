"""Pictures and videos in requests to ``llamafactory-cli api``: the answers are the chat's, and what cannot be read gets status 400."""

from __future__ import annotations

import base64
import io
import json

import openai
import pytest
from helpers.api import client_of
from helpers.chats import chat_model
from helpers.image_text import make_image_text_model, picture
from PIL import Image


@pytest.fixture(scope="module")
def chat(tmp_path_factory):
    path = make_image_text_model(tmp_path_factory.mktemp("model"), "qwen3_vl_moe")
    return chat_model(path, template="qwen3_vl_nothink", kt_backend="torch", max_new_tokens=6)


@pytest.fixture(scope="module")
def client(chat):
    return client_of(chat)


def image(url: str) -> dict:
    return {"type": "image_url", "image_url": {"url": url}}


def text(words: str) -> dict:
    return {"type": "text", "text": words}


def data_url(shown: Image.Image, kind: str = "png", **keys) -> str:
    file = io.BytesIO()
    shown.save(file, kind, **keys)
    return f"data:image/{kind};base64,{base64.b64encode(file.getvalue()).decode()}"


def ask(client, *turns, **keys):
    messages = [{"role": ("user", "assistant")[number % 2], "content": turn} for number, turn in enumerate(turns)]
    return client.chat.completions.create(model="any", messages=messages, **keys)


def test_two_pictures_and_a_turn_of_text(chat, client):
    pictures = [picture(), picture(64, 48, 1)]
    first = [image(data_url(pictures[0])), text("What is it, and "), image(data_url(pictures[1])), text("?")]
    said = [{"role": "user", "content": "<image>What is it, and <image>?"}]
    for turns, messages in (
        ([first], said),
        ([first, "A cat.", "Which?"], [*said, {"role": "assistant", "content": "A cat."}, {"role": "user", "content": "Which?"}]),
    ):  # fmt: skip
        (wanted,) = chat.chat(messages, images=list(pictures))
        answer = ask(client, *turns)
        assert (answer.choices[0].message.content, answer.usage.prompt_tokens) == (
            wanted.response_text,
            wanted.prompt_length,
        )
        chunks = ask(client, *turns, stream=True)
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == wanted.response_text
    (other,) = chat.chat(said, images=pictures[::-1])
    assert other.response_text != chat.chat(said, images=list(pictures))[0].response_text


def test_webp(client):
    asked = [text("What is it?")]
    wanted, found = (
        ask(client, [image(url), *asked]) for url in (data_url(picture()), data_url(picture(), "webp", lossless=True))
    )
    assert found.choices[0].message.content == wanted.choices[0].message.content


def test_what_stands_around_a_picture(chat, client):
    """A system prompt in parts, and a tool call with its result: what LLaMA-Factory's own chat makes of the same."""
    tools = [{"type": "function", "function": {"name": "look", "description": "Look.", "parameters": {"type": "object", "properties": {}}}}]  # fmt: skip
    call = {"id": "1", "type": "function", "function": {"name": "look", "arguments": '{"at": "it"}'}}
    answer = client.chat.completions.create(
        model="any", tools=tools,
        messages=[
            {"role": "system", "content": [text("Be brief."), text(" And kind.")]},
            {"role": "user", "content": [image(data_url(picture())), text("What is it?")]},
            {"role": "assistant", "content": None, "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "1", "content": [text("This: "), image(data_url(picture(64, 48, 1)))]},
        ],
    )  # fmt: skip
    said = [
        {"role": "user", "content": "<image>What is it?"},
        {"role": "function", "content": '[{"name": "look", "arguments": {"at": "it"}}]'},
        {"role": "observation", "content": "This: <image>"},
    ]
    functions = json.dumps([tool["function"] for tool in tools])
    (wanted,) = chat.chat(said, "Be brief. And kind.", functions, images=[picture(), picture(64, 48, 1)])
    assert (answer.choices[0].message.content, answer.usage.prompt_tokens) == (
        wanted.response_text,
        wanted.prompt_length,
    )


def test_pictures_and_calls_that_would_be_lost(client):
    for message, reason in (
        ({"role": "system", "content": [text("Like this:"), image(data_url(picture()))]}, "a system prompt takes text alone"),
        (
            {"role": "assistant", "tool_calls": [{"id": "1", "type": "function", "function": {"name": "look", "arguments": "it"}}]},
            "the arguments of the tool call look are not a JSON object",
        ),
    ):  # fmt: skip
        with pytest.raises(openai.BadRequestError, match=reason):
            client.chat.completions.create(model="any", messages=[message, {"role": "user", "content": "?"}])


@pytest.mark.parametrize(
    "content", ["Which?", [image(data_url(picture())), text("What is it?")]], ids=["text", "picture"]
)
def test_greedy_answers(client, content):
    """A temperature or a top_p of 0 is the likeliest token each time, for several answers too."""
    wanted = ask(client, content).choices[0].message.content  # the chat is greedy
    for keys in (
        {"temperature": 0},
        {"temperature": 0, "top_p": 0},
        {"extra_body": {"do_sample": True}, "temperature": 1.5, "top_p": 0},
    ):
        for count in (1, 2):
            answers = [choice.message.content for choice in ask(client, content, n=count, **keys).choices]
            assert answers == [wanted] * count, keys
    for nothing in ("n", "stream", "temperature", "top_p", "max_tokens", "stop", "tools", "presence_penalty"):
        assert ask(client, content, extra_body={nothing: None}).choices[0].message.content == wanted


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("item", "reason"),
    [
        (image("data:image/png;base64,AAAA"), "An image of the conversation cannot be read: it is no PNG"),
        (image(data_url(picture(640, 480), "jpeg")[:2000]), "An image, video or audio cannot be read"),
        (image(data_url(picture(), "tiff")), "image_url begins with 'data:image/tiff;.*one of the types png, jpg"),
        (image("/none/at/all.png"), "is neither a data URL, nor an address"),
        (image(""), "image_url has no url"),
        (image("file:///etc/hostname"), "Only HTTP/HTTPS URLs are allowed"),
        ({"type": "video_url", "video_url": {"url": "data:video/mp4;base64,AAAA"}}, "A video of the conversation cannot be read"),
        (text("<image>"), r"Places for images \(<image>\) in the messages: 1; images that came with them: 0"),
    ],
    ids=["no picture", "cut off", "type", "path", "no url", "file", "no video", "no picture for a place"],
)  # fmt: skip
def test_what_cannot_be_read(client, item, reason, stream):
    with pytest.raises(openai.BadRequestError, match=reason):
        ask(client, [item, text("What is it?")], stream=stream)


def test_a_picture_for_a_text_only_model(demo):
    client = client_of(chat_model(demo / "model", kt_backend="torch"))
    with pytest.raises(openai.BadRequestError, match="has images, but this chat's template takes none"):
        ask(client, [image(data_url(picture())), text("What is it?")])


def test_seeds_and_probabilities_beside_pictures(client):
    question = [image(data_url(picture())), text("What is it?")]
    drawn = {"max_tokens": 5, "temperature": 2.0, "logprobs": True, "extra_body": {"do_sample": True}}
    one, same, other = (ask(client, question, seed=seed, **drawn).choices[0] for seed in (1, 1, 2))
    assert one.message.content == same.message.content != other.message.content
    assert 0 < len(one.logprobs.content) <= 5 and one.logprobs == same.logprobs
    several = [choice.message.content for choice in ask(client, question, seed=1, n=3, **drawn).choices]
    assert several[0] == one.message.content and len(set(several)) == 3
    streamed = ["", "", ""]
    for chunk in ask(client, question, seed=1, n=3, stream=True, **drawn):
        streamed[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert streamed == several
