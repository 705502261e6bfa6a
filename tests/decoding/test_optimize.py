"""Preparing a whole model, from Python and in a chat."""

from __future__ import annotations

import pytest
from helpers.adapters import make_adapter
from helpers.chats import EXPECTED, PROMPTS, config
from helpers.loading import load, logits
from helpers.marks import needs_native
from helpers.models import make_model
from helpers.references import merged_float32, per_token
from torch import nn

from llamafactory_kt import (
    KTModelError,
    apply_adapter,
    optimize_for_inference,
    prepare_for_inference,
    switch_adapter,
)
from llamafactory_kt.decoding.native_linear import NativeLinear
from llamafactory_kt.model.state import kt_state

pytestmark = needs_native


def prepared_names(model: nn.Module) -> set[str]:
    """The last part of the names of prepared layers."""
    return {name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, NativeLinear)}


def under_its_old_name(model):
    with pytest.warns(DeprecationWarning, match="now called optimize_for_inference"):
        prepare_for_inference(model)


def test_prepared_from_python(tmp_path):
    """Through the PEFT wrapper that apply_adapter returns; the adapter is switched afterwards."""
    path = make_model(tmp_path / "model", "deepseek_v2")
    one = make_adapter(tmp_path / "one", path, rank=5, alpha=10)
    two = make_adapter(tmp_path / "two", path, rank=3, alpha=4, seed=2)
    model, _ = apply_adapter(load(path, "native", adapter=[str(one)]), one)
    assert not prepared_names(model)
    for optimize in (optimize_for_inference, optimize_for_inference, under_its_old_name):
        optimize(model)
        assert prepared_names(model) >= {"base_layer", "lm_head"}
    for adapter in (one, two):
        switch_adapter(model, adapter)
        assert per_token(logits(model), logits(merged_float32(path, [adapter]))) < 0.03
    with (
        kt_state(model).lock.generation(),
        pytest.raises(RuntimeError, match="cannot be changed from within a generation"),
    ):
        optimize_for_inference(model)
    with pytest.raises(KTModelError, match="Linear has no KT experts"):
        optimize_for_inference(nn.Linear(2, 2))


def test_a_chat_prepares(tmp_path, demo):
    """In LLaMA-Factory, with the adapter, and with the adapter merged."""
    from llamafactory.chat import ChatModel
    from yaml import safe_load

    adapter = str(demo / "adapter")
    for merged in (False, True):
        path = config(tmp_path, demo, kt_backend="native", adapter_name_or_path=adapter, kt_merge_adapter=merged)
        chat = ChatModel(safe_load(path.read_text()))
        assert prepared_names(chat.engine.model) >= {"lm_head", "o_proj" if merged else "base_layer"}
        said = [chat.chat([{"role": "user", "content": p}])[0].response_text for p in PROMPTS]
        assert said == [EXPECTED[p]["adapter"] for p in PROMPTS]
