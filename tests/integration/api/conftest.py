"""One small model in a chat, which the tests of what requests ask for share."""

from __future__ import annotations

import pytest
import torch
from helpers.api import client_of
from helpers.chats import chat_model
from helpers.models import make_model


@pytest.fixture(scope="package")
def model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("tiny") / "My-Model", "qwen3_moe", dtype=torch.float32)


@pytest.fixture(scope="package")
def chat(model):
    return chat_model(model, kt_backend="torch", infer_dtype="float32")


@pytest.fixture
def client(chat):
    return client_of(chat)
