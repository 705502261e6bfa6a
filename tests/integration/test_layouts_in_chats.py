"""Adapters in every layout, loaded by LLaMA-Factory."""

from __future__ import annotations

import shutil

import pytest
import torch
from helpers.foreign_adapters import BASE, BUNDLE, TARGETS, bundle_reference, moe_lora_of, stock
from helpers.loading import logits
from helpers.references import per_token
from peft import PeftModel
from transformers import AutoModelForCausalLM

from llamafactory_kt import KTPathError


def test_every_layout_through_llamafactory(tmp_path):
    """The official stack's bundle, PEFT's target_parameters, and moe_lora.pt through its own key."""
    from llamafactory.chat import ChatModel

    def chat(**keys):
        arguments = {
            "model_name_or_path": str(BASE),
            "template": "qwen",
            "use_kt": True,
            "infer_dtype": "bfloat16",
            **keys,
        }
        return logits(ChatModel(arguments).engine.model)

    plain = tmp_path / "plain"
    shutil.copytree(BUNDLE, plain)
    for name in ("kt_adapter_manifest.json", "fused_expert_lora.safetensors"):
        (plain / name).unlink()
    base, bundle = chat(), chat(adapter_name_or_path=str(BUNDLE))
    wanted = logits(bundle_reference(stock(), BUNDLE))
    bfloat16 = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.bfloat16)
    assert per_token(bundle, wanted) < 2 * per_token(logits(bfloat16), logits(stock()))
    moe_lora = moe_lora_of(BUNDLE, tmp_path / "experts.pt")
    assert torch.equal(chat(adapter_name_or_path=str(plain), kt_moe_lora_path=str(moe_lora)), bundle)
    trained = logits(PeftModel.from_pretrained(stock(), TARGETS))
    noise = per_token(logits(PeftModel.from_pretrained(bfloat16, TARGETS)), trained)
    assert per_token(chat(adapter_name_or_path=str(TARGETS)), trained) < 2 * noise
    assert not torch.equal(chat(kt_moe_lora_path=str(moe_lora)), base)
    with pytest.raises(KTPathError, match=r"kt_moe_lora_path: nowhere\.pt does not exist"):
        chat(kt_moe_lora_path="nowhere.pt")
