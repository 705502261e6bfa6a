"""Adapters in the forms that SGLang servers take."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from helpers.adapters import edit_adapter, make_adapter
from helpers.sglang import (
    experts_only,
    interpreter,
    rest_only,
)
from safetensors.torch import load_file

from llamafactory_kt import KTAdapterError, KTServerError
from llamafactory_kt.serving.options import discover


def test_bug_5_nothing_of_another_format_lies_under_safetensors(build, adapter, moe_lora, cache):
    """Everything prepared lies outside the adapter's directory, and each name fits the file's format."""
    before = sorted(adapter.iterdir())
    build(adapter_name_or_path=str(adapter))
    build(moe_lora, adapter_name_or_path=str(adapter))
    assert sorted(adapter.iterdir()) == before
    files = {path.name: path for path in cache.rglob("*.*") if path.is_file()}
    assert set(files) == {"entry.json", "adapter_config.json", "adapter_model.safetensors", "moe_lora.pt", ".lock"}
    assert all(load_file(path) for path in cache.rglob("*.safetensors"))
    assert torch.load(files["moe_lora.pt"], weights_only=True)["metadata"]["lora_rank"] == 8


def test_dialects(build, adapter, moe_lora, tmp_path):
    experts, rest = experts_only(tmp_path / "e", adapter), rest_only(tmp_path / "r", adapter)
    whole = build(adapter_name_or_path=str(adapter))
    assert whole.parsed.lora_paths[0].startswith("lora0=") and whole.parsed.kt_expert_lora_path is None
    assert "Every request must name the adapter" in whole.request_notice
    called_out = "Every request gets the experts' LoRA, also one to the base model"
    assert not any(called_out in notice for notice in whole.notices), "SGLang refuses such requests"
    alone = build(adapter_name_or_path=str(experts))
    assert (
        alone.parsed.lora_paths is None
        and Path(alone.parsed.kt_expert_lora_path).is_dir()
        and alone.request_notice is None
        and any(called_out in notice for notice in alone.notices)
    )
    assert build(adapter_name_or_path=str(rest)).parsed.kt_expert_lora_path is None

    old = build(moe_lora, adapter_name_or_path=str(adapter)).parsed
    assert (old.kt_moe_lora_rank, old.kt_moe_lora_alpha, old.kt_moe_sft_method) == (8, 16.0, "AMXBF16_SFT")
    assert Path(old.kt_moe_lora_path).name == "moe_lora.pt" and old.disable_radix_cache
    names = load_file(Path(old.lora_paths[0].partition("=")[2]) / "adapter_model.safetensors")
    assert names and not any(".mlp.experts." in name for name in names)
    with_rest = build(moe_lora, adapter_name_or_path=str(adapter))
    assert any(called_out in notice for notice in with_rest.notices)
    assert "Only requests that name the adapter get the rest of it" in with_rest.request_notice
    beside = build(adapter_name_or_path=str(rest), kt_moe_lora_path=old.kt_moe_lora_path)
    assert beside.adapter.experts and beside.adapter.name == "lora0"
    only = build(kt_moe_lora_path=old.kt_moe_lora_path, kt_moe_lora_rank=8, kt_moe_lora_alpha=16)
    assert Path(only.parsed.kt_expert_lora_path).is_dir() and only.adapter.name is None

    without = discover(str(interpreter(tmp_path, STANDIN_DIALECT="none")))
    with pytest.raises(KTServerError, match=r"has LoRA on routed experts, which sglang-kt 0.7.2 cannot apply"):
        build(without, adapter_name_or_path=str(adapter))
    assert build(without, adapter_name_or_path=str(rest)).adapter.name == "lora0"


def test_prepared_adapter_means_the_same(build, model, tmp_path):
    """With rsLoRA and different ranks: SGLang takes one alpha / r for everything, so scalings are folded in and ranks
    padded."""
    source = make_adapter(tmp_path / "a", model, rank=4, alpha=6, use_rslora=True, dtype=torch.float32)

    def wider(tensors):
        for name in [n for n in tensors if "q_proj.lora" in n]:
            tensors[name] = torch.cat([tensors[name]] * 2, dim=0 if ".lora_A." in name else 1)
        return tensors

    edit_adapter(source, wider)
    config = json.loads((source / "adapter_config.json").read_text())
    (source / "adapter_config.json").write_text(json.dumps({**config, "rank_pattern": {"q_proj": 8}}))
    merged = Path(build(adapter_name_or_path=str(source)).parsed.lora_paths[0].partition("=")[2])
    theirs, ours = (
        json.loads((merged / "adapter_config.json").read_text()),
        load_file(merged / "adapter_model.safetensors"),
    )
    before = load_file(source / "adapter_model.safetensors")
    assert theirs["r"] == 8 and not theirs["use_rslora"] and not theirs["rank_pattern"] and len(ours) == len(before)
    for name in [n for n in before if ".lora_A." in n]:
        other = name.replace(".lora_A.", ".lora_B.")
        rank = before[name].shape[0]
        wanted = 6 / rank**0.5 * before[other] @ before[name]
        found = theirs["lora_alpha"] / theirs["r"] * ours[other] @ ours[name]
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


def test_layers_without_expert_lora_get_zeros(build, adapter):
    """SGLang expects LoRA in every layer with routed experts."""
    merged = Path(build(adapter_name_or_path=str(adapter)).parsed.lora_paths[0].partition("=")[2])
    tensors = {
        n: t for n, t in load_file(merged / "adapter_model.safetensors").items() if ".layers.2.mlp.experts." in n
    }
    assert len(tensors) == 6 * 3 * 2 and not any(tensor.any() for tensor in tensors.values())


def test_latent_attention(build, adapter, tmp_path):
    """While decoding, SGLang adds the LoRA on kv_b_proj only if there is expert LoRA too."""
    assert build(adapter_name_or_path=str(adapter)).adapter.required
    rest = shutil.copytree(adapter, tmp_path / "rest")
    edit_adapter(rest, lambda tensors: {n: t for n, t in tensors.items() if ".mlp.experts." not in n})
    with pytest.raises(KTAdapterError, match="LoRA on kv_b_proj, but none on routed experts"):
        build(adapter_name_or_path=str(rest))
