"""Preparing whole models: from Python, and in a chat."""

from __future__ import annotations

import pytest
from helpers.adapters import make_adapter
from helpers.chats import EXPECTED, PROMPTS, config
from helpers.loading import load, logits
from helpers.marks import needs_onednn
from helpers.models import make_model
from helpers.references import merged_float32, per_token
from torch import nn

from llamafactory_kt import KTModelError, apply_adapter, prepare_for_inference, switch_adapter
from llamafactory_kt.decoding import prepare
from llamafactory_kt.matmul.layouts import is_packed
from llamafactory_kt.matmul.linear import PreparedLinear

pytestmark = needs_onednn


@pytest.fixture(autouse=True)
def every_size(monkeypatch):
    monkeypatch.setattr(prepare, "SMALLEST", 0)


def names(model: nn.Module, only_packed: bool = False) -> set[str]:
    """Of the prepared layers, or of those whose weights are packed."""
    prepared = ((name, module) for name, module in model.named_modules() if isinstance(module, PreparedLinear))
    return {n.rpartition(".")[2] for n, m in prepared if is_packed(m.weight) or not only_packed}


def test_prepared_from_python(tmp_path):
    """Through PEFT's wrapper, as apply_adapter gives it, with an adapter that is exchanged afterwards."""
    path = make_model(tmp_path / "model", "deepseek_v2")
    one = make_adapter(tmp_path / "one", path, rank=5, alpha=10)
    two = make_adapter(tmp_path / "two", path, rank=3, alpha=4, seed=2)
    model, _ = apply_adapter(load(path, "oneDNN", adapter=[str(one)]), one)
    assert not names(model)
    for _ in range(2):
        prepare_for_inference(model)
        assert names(model) >= {"base_layer", "lm_head"}
    for adapter in (one, two):
        switch_adapter(model, adapter)
        assert per_token(logits(model), logits(merged_float32(path, [adapter]))) < 0.03
    with (
        model.get_base_model()._kt_gate.generation(),
        pytest.raises(RuntimeError, match="cannot be changed from within a generation"),
    ):
        prepare_for_inference(model)
    with pytest.raises(KTModelError, match="Linear has no KT experts"):
        prepare_for_inference(nn.Linear(2, 2))


def test_a_chat_prepares(tmp_path, demo):
    """Through LLaMA-Factory, with the adapter, and again with the adapter merged."""
    from llamafactory.chat import ChatModel
    from yaml import safe_load

    adapter = str(demo / "adapter")
    for merged in (False, True):
        path = config(tmp_path, demo, kt_backend="oneDNN", adapter_name_or_path=adapter, kt_merge_adapter=merged)
        chat = ChatModel(safe_load(path.read_text()))
        assert names(chat.engine.model) >= {"lm_head", "o_proj" if merged else "base_layer"}
        said = [chat.chat([{"role": "user", "content": p}])[0].response_text for p in PROMPTS]
        assert said == [EXPECTED[p]["adapter"] for p in PROMPTS]
