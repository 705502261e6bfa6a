"""A version that nobody has tested chats, with one warning, if three tokens of its first layer are right; else the load stops."""

from __future__ import annotations

import pytest
import torch
from helpers.adapters import make_adapter
from helpers.fp8 import make_fp8
from helpers.loading import load, logits
from helpers.marks import ENGINES
from helpers.models import make_model
from transformers.core_model_loading import Concatenate

from llamafactory_kt import KTModelError
from llamafactory_kt.ground import internals
from llamafactory_kt.peft_side import model_names


@pytest.fixture
def untested(monkeypatch):
    """Let the installed transformers be one that nobody has tested."""
    monkeypatch.setitem(internals.TESTED, "transformers", "<5")
    assert len(internals.untested()) == 1


@pytest.mark.parametrize("engine", ENGINES)
def test_one_warning(tmp_path, untested, kt_log, engine):
    path = make_model(tmp_path / "model", "deepseek_v3")
    found = logits(load(path, engine))
    warnings = [record.getMessage() for record in kt_log.records if record.levelname == "WARNING"]
    assert len(warnings) == 1 and "(tested: <5): 3 tokens of layer 1's experts are" in warnings[0]
    assert found.isfinite().all()


@pytest.mark.parametrize("fused", [False, True])
def test_what_the_checkpoint_has(tmp_path, untested, kt_log, fused):
    """Fused and split experts, FP8, and an adapter that is merged into the weights."""
    path = make_model(tmp_path / "model", "mixtral", dtype=torch.float32, save_original_format=not fused)
    adapter = make_adapter(tmp_path / "adapter", path, naming="mixtral")
    load(path, "torch", dtype=torch.float32)
    load(path, "torch", dtype=torch.float32, adapter=str(adapter), merge_adapter=True)
    if not fused:
        load(make_fp8(tmp_path, path, [32, 32])[0], "torch")
    assert sum("as they should be" in record.getMessage() for record in kt_log.records) == 3 - fused


def test_rules_that_have_changed(tmp_path, untested, monkeypatch):
    """Here gate and up change places; by name, nothing is new."""
    path = make_model(tmp_path / "model", "qwen3_moe")
    stock = Concatenate.convert

    def turned(self, *args, **kwargs):
        return {name: weight.roll(weight.shape[1] // 2, 1) for name, weight in stock(self, *args, **kwargs).items()}

    monkeypatch.setattr(Concatenate, "convert", turned)
    with pytest.raises(
        KTModelError, match=r"Untested: transformers .* 3 tokens of layer 0's experts are .*; 0.02 are allowed"
    ):
        load(path, "torch")


def test_rules_that_fail(tmp_path, untested, monkeypatch):
    path = make_model(tmp_path / "model", "qwen3_moe")
    monkeypatch.setattr(Concatenate, "convert", lambda self, tensors: tensors)
    with pytest.raises(
        KTModelError, match=r"and the check of layer 0 fails with TypeError: .* Install tested versions"
    ):
        load(path, "torch")


def test_settings_of_rules_that_are_not_known(tmp_path, monkeypatch):
    """In tested versions too: no tensor is converted in another way than transformers would."""
    path = make_model(tmp_path / "model", "qwen3_moe")
    monkeypatch.setitem(model_names._KNOWN, "Concatenate", {"dim": 2})
    with pytest.raises(
        KTModelError, match=r"Unsupported weight naming scheme: .* by MergeModulelist \+ Concatenate\(\{'dim': 1\}\)"
    ):
        load(path, "torch")
