"""Adapters by the value of ``init_lora_weights`` that they were trained with: those that moved the base are refused, others are exact."""

from __future__ import annotations

import json

import pytest
import torch
from helpers.loading import load, logits
from helpers.models import make_model
from helpers.references import per_token
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from llamafactory_kt import KTAdapterError, apply_adapter, switch_adapter


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("base"), "qwen3_moe", num_hidden_layers=2, tie_word_embeddings=False)


def train(base, start):
    torch.manual_seed(5)
    stock = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    keys = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
    return get_peft_model(stock, LoraConfig(init_lora_weights=start, **keys))


def step(model):
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


@pytest.mark.parametrize("start", [True, "gaussian", "orthogonal", "eva"])
def test_plain_lora(base, tmp_path, start):
    model = step(train(base, "gaussian" if start == "eva" else start))
    model.peft_config["default"].init_lora_weights = start
    model.save_pretrained(tmp_path / "adapter")
    ours, _ = apply_adapter(load(base, "torch", dtype=torch.float32), tmp_path / "adapter")
    assert per_token(logits(ours), logits(model)) < 1e-5


@pytest.mark.parametrize("start", ["pissa", "pissa_niter_4", "olora"])
def test_converted_to_plain_lora(base, tmp_path, start):
    """As PEFT and LLaMA-Factory's pissa_convert convert it; as it was saved before, it is refused."""
    model = train(base, start)
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(tmp_path / "start")
    step(model)
    model.peft_config["default"].init_lora_weights = start
    model.save_pretrained(tmp_path / "adapter")
    wanted = logits(model)
    plain = load(base, "torch", dtype=torch.float32)
    before = logits(plain)
    with pytest.raises(KTAdapterError, match=f"init_lora_weights: {start}. .*pissa_convert"):
        switch_adapter(plain, tmp_path / "adapter")
    assert torch.equal(logits(plain), before)

    try:
        model.save_pretrained(tmp_path / "converted", path_initial_model_for_weight_conversion=tmp_path / "start")
    except TypeError as error:  # PEFT 0.19.1 beside transformers 5.12
        pytest.skip(f"this PEFT cannot convert beside this transformers: {error}")
    ours, _ = apply_adapter(plain, tmp_path / "converted")
    assert per_token(logits(ours), wanted) < 1e-4
    stock = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    assert per_token(logits(PeftModel.from_pretrained(stock, tmp_path / "converted")), logits(ours)) < 1e-5


@pytest.mark.parametrize("start", ["corda", "loftq", "lora_ga", "PiSSA", "what PEFT adds next"])
def test_starts_that_move_the_base(base, tmp_path, start):
    train(base, True).save_pretrained(tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "init_lora_weights": start}))
    with pytest.raises(KTAdapterError, match=f"init_lora_weights: {start}"):
        load(base, "torch", adapter=str(tmp_path / "adapter"))
