"""Errors while an answer is generated."""

from __future__ import annotations

from types import SimpleNamespace

import openai
import pytest
from helpers.api import ask

from llamafactory_kt.model.state import set_kt_state


def test_what_goes_wrong_while_generating(tmp_path):
    """The engine breaks in the middle of an answer, which the model itself cannot be made to do."""
    from fastapi.testclient import TestClient
    from llamafactory.api import app as module

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
    http = TestClient(module.create_app(Broken()), raise_server_exceptions=False)
    client = openai.OpenAI(base_url="http://testserver/v1", api_key="none", max_retries=0, http_client=http)
    with pytest.raises(openai.InternalServerError, match="RuntimeError: broken on purpose"):
        ask(client, "x")
    texts = []
    with pytest.raises(openai.APIError, match="RuntimeError: broken on purpose"):
        for chunk in ask(client, "x", stream=True):
            texts.append(chunk.choices[0].delta.content)
    assert texts == ["", "one"]
