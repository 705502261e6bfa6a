"""A PEFT that nobody has tested: the first layer with LoRA must be right. And settings that came with a newer one."""

from __future__ import annotations

import json

import pytest
import torch
from helpers.adapters import make_adapter
from helpers.loading import load
from helpers.models import make_model
from peft.tuners.lora import Linear

from llamafactory_kt import KTAdapterError, apply_adapter, switch_adapter
from llamafactory_kt.ground.internals import TESTED, Internal
from llamafactory_kt.peft_side import swap


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("m"), "deepseek_v2")


@pytest.fixture
def untested(monkeypatch):
    monkeypatch.setattr(swap, "INTERNAL", Internal("peft-layers", "peft", "<0.1", essential=True))
    monkeypatch.setitem(TESTED, "peft", "<0.1")


def test_right_and_wrong(tmp_path, model, untested, monkeypatch):
    one = make_adapter(tmp_path / "one", model, rank=3, use_rslora=True)
    two = make_adapter(tmp_path / "two", model, rank=5, seed=2)
    loaded = load(model, "torch", dtype=torch.float32)
    wrapped, _ = apply_adapter(loaded, [one, two])
    monkeypatch.setattr(Linear, "forward", lambda self, x, *args, **kwargs: self.base_layer(x))
    with pytest.raises(
        KTAdapterError, match=r"Untested: peft .* \(tested: <0.1\): the LoRA of \S*proj is 1 from float32"
    ):
        switch_adapter(wrapped, two)


def test_settings_that_this_peft_does_not_know(tmp_path, model):
    adapter = make_adapter(tmp_path / "adapter", model)
    file = adapter / "adapter_config.json"
    config = json.loads(file.read_text())
    for value, refused in (({"a": 1}, True), (None, False)):
        file.write_text(json.dumps({**config, "newer_config": value, "peft_version": "0.30.0", "comment": "mine"}))
        if refused:
            with pytest.raises(
                KTAdapterError, match="newer_config is set: it makes of the adapter something else than LoRA"
            ):
                apply_adapter(load(model, "torch"), adapter)
        else:
            apply_adapter(load(model, "torch"), adapter)
