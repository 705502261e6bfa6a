"""Experts that compute something else than gated SiLU: every engine that says it can, with LoRA on their weights, against PEFT's own
merge into stock transformers; and what is refused."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers.architectures import tiny_model
from helpers.loading import load, logits
from helpers.marks import needs_kernel, needs_onednn
from helpers.references import per_token
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from llamafactory_kt import KTKernelError, apply_adapter
from llamafactory_kt.engines import base, registry
from llamafactory_kt.engines.reference import ReferenceEngine
from llamafactory_kt.model.state import kt_state

GATED = ["experts.gate_up_proj", "experts.down_proj"]
DEVIATING = {
    "gpt_oss": GATED,
    "gemma4_text": GATED,
    "llama4_text": ["feed_forward.experts.gate_up_proj", "feed_forward.experts.down_proj"],
    "nemotron_h": ["experts.up_proj", "experts.down_proj"],
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Checkpoints in bfloat16, each with an adapter that PEFT made for it and stock transformers' float32 model with it merged."""
    made = {}

    def get(name: str):
        if name not in made:
            path = tmp_path_factory.mktemp(name)
            tiny_model(name).to(torch.bfloat16).save_pretrained(path / "model")
            made[name] = path / "model", *peft(path, DEVIATING[name])
        return made[name]

    return get


def peft(path, targets, rank=3):
    torch.manual_seed(3)
    stock = AutoModelForCausalLM.from_pretrained(path / "model", dtype=torch.float32)
    config = LoraConfig(
        r=rank, lora_alpha=7, target_modules=["q_proj"], target_parameters=targets, task_type="CAUSAL_LM"
    )
    adapted = get_peft_model(stock, config)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.normal_(0, 0.3)
    adapted.save_pretrained(path / "adapter")
    return path / "adapter", adapted.eval()


@pytest.mark.parametrize("name", DEVIATING)
def test_lora_is_exact(models, name):
    path, adapter, reference = models(name)
    found = logits(apply_adapter(load(path, "torch", dtype=torch.float32, adapter=str(adapter)), adapter)[0])
    with reference.disable_adapter():
        base_model = logits(reference)
    assert per_token(base_model, logits(reference)) > 0.1
    assert per_token(found, logits(reference)) < 1e-5


@needs_onednn
@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("name", DEVIATING)
def test_onednn(models, name, merged):
    """Within twice the error of stock transformers in bfloat16."""
    path, adapter, reference = models(name)
    model = load(path, "oneDNN", adapter=str(adapter), merge_adapter=merged)
    found = logits(apply_adapter(model, adapter)[0])
    wanted = logits(reference)
    noise = per_token(logits(copy.deepcopy(reference).merge_and_unload().to(torch.bfloat16)), wanted)
    assert per_token(found, wanted) < 2 * noise


def test_auto_takes_an_engine_that_can(models):
    path, *_ = models("gpt_oss")
    assert kt_state(load(path)).plan.backend in ("oneDNN", "torch")


@needs_kernel
@pytest.mark.parametrize("name", ["gpt_oss", "gemma4_text", "nemotron_h"])
def test_kt_kernel_is_refused_before_weights_load(models, name, monkeypatch):
    monkeypatch.setattr(registry.get_engine("AMXBF16"), "load", None)
    path, *_ = models(name)
    with pytest.raises(
        KTKernelError, match=r"AMXBF16 cannot compute the experts of this model: they are down\(.*, and it computes"
    ):
        load(path, "AMXBF16")


class Foreign(ReferenceEngine):
    """An engine of another distribution, which says nothing about formulas."""

    name = "foreign"
    cannot_compute = base.Engine.cannot_compute


def test_other_engines_get_plain_experts_alone(models, monkeypatch):
    monkeypatch.setattr(registry, "engines", lambda: (Foreign, ReferenceEngine))
    monkeypatch.setattr("llamafactory_kt.autotune.plan.engines", lambda: (Foreign, ReferenceEngine))
    monkeypatch.setattr(Foreign, "auto", classmethod(lambda cls, merged: True))
    path, *_ = models("gpt_oss")
    assert kt_state(load(path)).plan.backend == "torch"
    with pytest.raises(KTKernelError, match="foreign cannot compute the experts"):
        load(path, "foreign")
    plain, *_ = models("llama4_text")
    assert kt_state(load(plain)).plan.backend == "foreign"
