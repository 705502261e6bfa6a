"""Requests that ``llamafactory-cli api`` cannot answer, and what it says."""

from __future__ import annotations

import httpx
import openai
import pytest
from helpers.api import ask
from helpers.chats import EXPECTED, PROMPTS

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
        ({"max_tokens": -(10**400)}, "max_tokens: -1000"),
        ({"temperature": -1, "top_p": 2}, "temperature: -1.0 is not 0 or more. top_p: 2.0 is not above 0"),
        ({"n": 0}, "n: 0 is not between 1 and 128"),
        ({"n": 10**6}, "n: 1000000 is not between"),
        ({"presence_penalty": -1}, "presence_penalty: -1.0 is not"),
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
    """After all that, and where there is nothing."""
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("none")
    assert caught.value.body["message"] == "Not Found"
    assert ask(client, PROMPTS[2]).choices[0].message.content == EXPECTED[PROMPTS[2]]["adapter"]
