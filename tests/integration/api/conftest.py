"""One small model in a chat, and a server, which the tests of what requests ask for share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from helpers.api import client_of, serving
from helpers.chats import chat_model, config
from helpers.marks import FASTEST
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


@pytest.fixture(scope="package")
def server(tmp_path_factory, demo) -> Iterator[str]:
    """The address of a server with the demo's adapter, or by name without it, which handles four requests at a time."""
    directory = tmp_path_factory.mktemp("server")
    adapters = {"adapter_name_or_path": str(demo / "adapter"), "kt_adapters": {"plain": None}}
    path = config(directory, demo, kt_backend=FASTEST, kt_num_threads=None, **adapters)
    with serving(path, directory / "log", MAX_CONCURRENT="4", API_MODEL_NAME="any") as (address, _):
        yield address
