"""Models that contain a language model as one part."""

from __future__ import annotations

import pytest
import torch
from helpers.adapters import write_config
from helpers.references import rel
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM

from llamafactory_kt import KTExpertsConfig, apply_adapter


@torch.inference_mode()
def logits(model):
    return model(input_ids=torch.arange(2, 30)[None]).logits


def stock(path):
    return logits(AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32))


@pytest.mark.parametrize("prefix", ["base_model.model.model.language_model.", "model.language_model."])
def test_composite_model(tmp_path, prefix):
    """A vision-language model: its experts, attention and their LoRA, compared with a plain float32 sum."""
    from transformers import AutoModelForImageTextToText

    text = {
        "vocab_size": 300, "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 16, "num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 96,
        "pad_token_id": 1, "rope_parameters": {"rope_type": "default", "mrope_section": [4, 2, 2], "rope_theta": 10000.0},
    }  # fmt: skip
    vision = {
        "depth": 1, "hidden_size": 32, "intermediate_size": 64, "num_heads": 2, "out_hidden_size": 64, "patch_size": 4,
        "deepstack_visual_indexes": [0],
    }  # fmt: skip
    torch.manual_seed(0)
    stock = AutoModelForImageTextToText.from_config(
        AutoConfig.for_model("qwen3_vl_moe", text_config=text, vision_config=vision), dtype=torch.float32
    )
    with torch.no_grad():
        for parameter in stock.parameters():
            if parameter.dim() >= 2:
                parameter.normal_(0, parameter.shape[-1] ** -0.5)
    stock.save_pretrained(tmp_path / "model")

    tensors, weights = {}, dict(stock.named_parameters())

    def lora(module, out, size):
        a, b = torch.randn(5, size) * size**-0.5, torch.randn(out, 5) * 0.2
        tensors[f"{prefix}{module}.lora_A.weight"], tensors[f"{prefix}{module}.lora_B.weight"] = a, b
        return 2 * (b @ a)

    ids = torch.arange(5, 40)[None]
    with torch.inference_mode():
        base = stock(input_ids=ids).logits
        for layer in range(2):
            name = f"model.language_model.layers.{layer}"
            weights[f"{name}.self_attn.q_proj.weight"] += lora(f"layers.{layer}.self_attn.q_proj", 64, 64)
            for expert in range(6):
                module = f"layers.{layer}.mlp.experts.{expert}"
                gate_up = torch.cat([lora(f"{module}.{p}_proj", 96, 64) for p in ("gate", "up")])
                weights[f"{name}.mlp.experts.gate_up_proj"][expert] += gate_up
                weights[f"{name}.mlp.experts.down_proj"][expert] += lora(f"{module}.down_proj", 64, 96)
        wanted = stock(input_ids=ids).logits
    (tmp_path / "adapter").mkdir()
    save_file(tensors, tmp_path / "adapter" / "adapter_model.safetensors")
    write_config(tmp_path / "adapter", "base", r=5, lora_alpha=10, target_modules=["q_proj", "gate_proj"])

    ours = AutoModelForImageTextToText.from_pretrained(
        tmp_path / "model", dtype=torch.float32, quantization_config=KTExpertsConfig(backend="torch")
    )
    with torch.inference_mode():
        assert rel(ours(input_ids=ids).logits, base) < 2e-5
        wrapped, report = apply_adapter(ours, tmp_path / "adapter")
        assert (report.peft, report.experts) == (4, 72)
        assert rel(wrapped(input_ids=ids).logits, wanted) < 2e-5 < rel(base, wanted)
