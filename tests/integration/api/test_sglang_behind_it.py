"""LLaMA-Factory's API in front of an SGLang server."""

from __future__ import annotations

import json

import openai
import pytest
import yaml
from helpers.api import ask, serving_here
from helpers.children import KT, child


def test_llamafactorys_own_api(standin):
    """Bad requests get status 400, ``n`` gives several answers, and ``bench`` can measure it, as it reports
    token counts."""
    from llamafactory.chat import ChatModel

    path, _ = standin()
    model = ChatModel(yaml.safe_load(path.read_text("utf-8")))
    try:
        with serving_here(model) as (host, port):
            words = ["bench", "--endpoint", f"http://{host}:{port}", "--requests", "3", "--json", "-"]
            result = child(KT, *words)
            client = openai.OpenAI(base_url=f"http://{host}:{port}/v1", api_key="none", max_retries=0)
            two = ask(client, "hello", n=2)
            picture = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "picture.png"}}]}]
            refused = []
            for bad in ({"max_tokens": 10**6}, {"temperature": -1, "stream": True}, {"messages": picture}):
                with pytest.raises(openai.BadRequestError) as error:
                    messages = [{"role": "user", "content": "hello"}]
                    client.chat.completions.create(**{"model": "any", "messages": messages, **bad})
                refused.append(error.value.body["message"])
    finally:
        model.engine._cleanup_server()
    assert [choice.message.content for choice in two.choices] == ["lora=None tokens=14 你好"] * 2
    for wanted, found in zip(("context has 4096 tokens", "temperature: -1", "more than text"), refused, strict=True):
        assert wanted in found
    measured = json.loads(result.stdout)
    assert (measured["requests"], measured["tokens"], measured["counted"]) == (3, 9, True), result.stdout


@pytest.mark.parametrize(
    "keys",
    [
        {"seed": 1}, {"logprobs": True}, {"logit_bias": {"1": 1}}, {"response_format": {"type": "json_object"}},
        {"tool_choice": "required", "tools": [{"type": "function", "function": {"name": "f"}}]},
    ],
)  # fmt: skip
def test_what_it_is_not_asked_for(keys):
    from llamafactory_kt.integration.api.checking import prepare_chat
    from llamafactory_kt.integration.api.errors import BadRequest
    from llamafactory_kt.integration.api.models import Models
    from llamafactory_kt.integration.api.protocol.chat_request import ChatRequest
    from llamafactory_kt.integration.sglang_engine import KTSGLangEngine

    class Engine(KTSGLangEngine):
        def __init__(self):
            self.tokenizer = range(9)

    request = ChatRequest.model_validate({"model": "any", "messages": [{"role": "user", "content": "x"}], **keys})
    with pytest.raises(BadRequest, match="cannot be asked for with infer_backend: sglang") as caught:
        prepare_chat(request, Engine(), Models(Engine()), None)
    assert caught.value.param in keys
