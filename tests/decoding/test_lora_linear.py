"""LoRA on prepared layers, compared with PEFT in float32."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers.marks import needs_native
from helpers.references import rel
from peft import LoraConfig, PeftModel
from peft.tuners.lora import Linear
from torch import nn

from llamafactory_kt.decoding.lora_linear import InferenceLora
from llamafactory_kt.decoding.native_linear import NativeLinear
from llamafactory_kt.decoding.prepare import prepare_layers

pytestmark = needs_native


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


@pytest.mark.parametrize("rows", [1, 3, 16, 300])
@torch.inference_mode()
def test_lora_against_peft_in_float32(rows):
    model, reference = lora_layer()
    prepare_layers(model, copy=True)
    layer = model.base_model.model[0]
    assert type(layer.base_layer) is NativeLinear and type(layer) is InferenceLora
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


def test_lora_moves_with_its_layer():
    model, _ = lora_layer()
    prepare_layers(model, copy=True)
    model.to("meta")
    assert model(torch.empty(2, 96, dtype=torch.bfloat16, device="meta")).shape == (2, 160)


@torch.inference_mode()
def test_lora_of_another_dtype_or_scaling():
    """Calls that are kept are of the scaling, and of where the weight lies."""
    model, reference = lora_layer()
    prepare_layers(model, copy=True)
    x = torch.randn(3, 96)
    for scaling in (1.0, 7.0):
        for each in (model, reference):
            each.base_model.model[0].scaling["one"] = scaling
        assert rel(model(x.bfloat16()), reference(x)) < 0.02
    model.float()
    assert rel(model(x), reference(x)) < 1e-5


def test_lora_and_bias_that_are_changed_in_place():
    """As PEFT's ``set_peft_model_state_dict`` and PyTorch's ``load_state_dict`` do it, at any time."""
    model, reference = lora_layer()
    for each in (model, reference):
        each.base_model.model[0].base_layer.bias.requires_grad_(False)
    prepare_layers(model, copy=True)
    x = torch.randn(3, 96).bfloat16()
    seen = [model(x)]
    for name in ("base_layer.bias", "lora_A.one.weight", "lora_B.two.weight"):
        for each in (model, reference):
            with torch.no_grad():
                each.base_model.model[0].get_parameter(name).mul_(-30)
        seen.append(model(x))
        assert rel(seen[-1], reference(x.float())) < 0.02 and rel(seen[-1], seen[-2]) > 0.05, name


def test_what_pytorch_has_to_say():
    """Of inputs with another width, and gradients, also once a call is kept."""
    model, _ = lora_layer()
    prepare_layers(model, copy=True)
    model(torch.randn(3, 96).bfloat16())
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        model(torch.randn(3, 95).bfloat16())
    model(x := torch.randn(3, 96, dtype=torch.bfloat16, requires_grad=True)).sum().backward()
    assert x.grad is not None and x.grad.any()


def test_lora_with_a_bias_is_left_to_peft():
    model, reference = lora_layer(lora_bias=True)
    x = torch.randn(2, 9, 96).to(torch.bfloat16)
    prepare_layers(model, copy=True)
    assert type(model.base_model.model[0]) is Linear
    assert rel(model(x), reference(x.float())) < 0.01
