"""Attention that LLaMA-Factory cannot set up with this transformers."""

from __future__ import annotations

import shutil

import pytest
import torch
from helpers.architectures import tiny_model
from helpers.chats import chat_model
from helpers.loading import logits
from helpers.places import DEMO
from helpers.references import per_token
from llamafactory.chat import ChatModel

MISSING = "load_and_register_kernel"


@pytest.fixture(scope="module")
def gpt_oss(tmp_path_factory):
    path = tmp_path_factory.mktemp("gpt_oss")
    model = tiny_model("gpt_oss")
    model.save_pretrained(path)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO / "model" / file, path)
    return path, model


def test_chat_with_gpt_oss(gpt_oss, kt_log):
    path, stock = gpt_oss
    model = chat_model(path, kt_backend="torch").engine.model
    assert (
        f"LLaMA-Factory's attention for gpt_oss is not used, since this transformers lacks it (cannot import name '{MISSING}'"
        in kt_log.text
    )
    with torch.inference_mode():
        assert per_token(logits(model), logits(stock)) < 1e-5


def test_stock_is_unchanged(gpt_oss):
    with pytest.raises(ImportError, match=MISSING):
        ChatModel({"model_name_or_path": str(gpt_oss[0]), "template": "deepseek"})
