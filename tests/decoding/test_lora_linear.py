"""LoRA on prepared layers, compared with PEFT in float32."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers.marks import needs_onednn
from helpers.references import rel
from peft import LoraConfig, PeftModel
from peft.tuners.lora import Linear
from torch import nn

from llamafactory_kt.decoding import prepare
from llamafactory_kt.decoding.lora_linear import FEW_ROWS, InferenceLora
from llamafactory_kt.decoding.prepare import prepare_layers
from llamafactory_kt.matmul.linear import PreparedLinear

pytestmark = [needs_onednn, pytest.mark.usefixtures("every_size")]


def lora_layer(**settings: object) -> tuple[nn.Module, nn.Module]:
    """A layer with two active adapters of different rank and scaling, in bfloat16 and in float32."""
    layer = nn.Sequential(nn.Linear(96, 160, dtype=torch.bfloat16))
    config = {"target_modules": ["0"], "inference_mode": True}
    model = PeftModel(layer, LoraConfig(r=5, lora_alpha=15, **config), adapter_name="one")
    model.add_adapter("two", LoraConfig(r=3, lora_alpha=4, **config, **settings))
    model.base_model.set_adapter(["one", "two"], inference_mode=True)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if "lora_B" in name:
                value.normal_(std=2)  # far above what rounding the sum to bfloat16 costs
    return model.eval(), copy.deepcopy(model).float()


@pytest.mark.parametrize("rows", [1, FEW_ROWS - 1, FEW_ROWS, 3 * FEW_ROWS])
@torch.inference_mode()
def test_lora_against_peft_in_float32(kind, rows):
    model, reference = lora_layer()
    prepare_layers(model)
    layer = model.base_model.model[0]
    assert type(layer.base_layer) is PreparedLinear and type(layer) is InferenceLora
    x = torch.randn(1, rows, 96).to(torch.bfloat16)

    def effect(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
        with model.disable_adapter():
            base = model(x)
        found = model(x)
        assert found.dtype == base.dtype
        return found.float() - base.float()

    wanted = effect(reference, x.float())
    assert (effect(model, x) - wanted).norm() < 0.01 * wanted.norm()
    model.base_model.set_adapter("two", inference_mode=True)
    reference.base_model.set_adapter("two", inference_mode=True)
    other = effect(reference, x.float())
    assert (effect(model, x) - other).norm() < 0.01 * other.norm() < 0.01 * (wanted - other).norm() * 2
    with pytest.raises(RuntimeError, match="kt_merge_adapter: true merges it"):
        model.merge_adapter()


def test_lora_moves_with_its_layer(monkeypatch):
    monkeypatch.setattr(prepare, "SMALLEST", 2**20)
    model, _ = lora_layer()
    prepare_layers(model)
    model.to("meta")
    assert model(torch.empty(2, 96, dtype=torch.bfloat16, device="meta")).shape == (2, 160)


@pytest.mark.parametrize("kind", ["no kernels"], indirect=True)
@torch.inference_mode()
def test_lora_on_a_layer_that_is_not_prepared(kind, monkeypatch):
    """It is too small, and its own product takes bfloat16 only."""
    monkeypatch.setattr(prepare, "SMALLEST", 2**20)
    model, reference = lora_layer()
    prepare_layers(model)
    layer = model.base_model.model[0]
    assert type(layer) is InferenceLora and type(layer.base_layer) is nn.Linear
    for rows in (1, FEW_ROWS):
        x = torch.randn(rows, 96).to(torch.bfloat16)
        assert rel(model(x), reference(x.float())) < 0.01


def test_lora_with_a_bias_is_left_to_peft():
    model, reference = lora_layer(lora_bias=True)
    x = torch.randn(2, FEW_ROWS, 96).to(torch.bfloat16)
    prepare_layers(model)
    assert type(model.base_model.model[0]) is Linear
    assert rel(model(x), reference(x.float())) < 0.01
