from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from helpers.adapters import make_adapter
from helpers.models import make_model
from helpers.sglang import RECORDED, configuration, interpreter

from llamafactory_kt.cli.serve import model_arguments
from llamafactory_kt.serving.command import server_command
from llamafactory_kt.serving.options import ServerOptions, discover


@pytest.fixture(scope="session")
def model(tmp_path_factory) -> Path:
    return make_model(tmp_path_factory.mktemp("models") / "a model", "deepseek_v2")


@pytest.fixture(scope="session")
def adapter(tmp_path_factory, model) -> Path:
    """With LoRA on experts and on the rest; layer 2 has no expert LoRA."""
    return make_adapter(tmp_path_factory.mktemp("adapters") / "whole", model, skip_layers=(2,))


@pytest.fixture(scope="session")
def recorded() -> ServerOptions:
    """The options of sglang-kt 0.7.2, as recorded from it."""
    facts = json.loads(RECORDED.read_text())
    return ServerOptions("/opt/sglang/bin/python", "sglang-kt 0.7.2", facts["options"], facts["architectures"])


@pytest.fixture
def moe_lora(tmp_path) -> ServerOptions:
    """The options of a server that takes expert LoRA as moe_lora.pt."""
    return discover(str(interpreter(tmp_path, STANDIN_DIALECT="moe-lora")))


@pytest.fixture
def build(tmp_path, model, recorded, cache):
    """Makes the command of a server from configuration keys."""

    def build(options=recorded, extra=(), **keys):
        args = model_arguments(configuration(tmp_path, Path(sys.executable), keys.pop("model", model), **keys))
        return server_command(args, options, extra)

    return build


@pytest.fixture
def command(standin):
    """Makes the stand-in's command in a given mode; also returns the file with its notes."""

    def command(fail: str = ""):
        path, notes = standin(fail)
        args = model_arguments(path)
        return server_command(args, discover(args.kt_sglang_python)), notes

    return command
