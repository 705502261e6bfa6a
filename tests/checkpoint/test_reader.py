"""Checkpoints in every layout, and checkpoints that cannot be right."""

from __future__ import annotations

import pytest
import torch
from helpers.loading import answer, load
from helpers.marks import needs_kernel
from helpers.models import make_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from llamafactory_kt import KTModelError


def stock(path):
    return answer(AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32))


def ours(path):
    return answer(load(path, "torch", dtype=torch.float32))


@pytest.mark.parametrize("name", ["deepseek_v3", "mixtral"])
def test_sharded_and_fused_checkpoints(tmp_path, name):
    path = make_model(tmp_path / "single", name)
    wanted = stock(path)
    assert torch.allclose(ours(path), wanted, atol=1e-4)
    sharded = make_model(tmp_path / "sharded", name, max_shard_size="200KB")
    assert len(list(sharded.glob("*.safetensors"))) > 3
    assert torch.allclose(ours(sharded), wanted, atol=1e-4)
    fused = make_model(tmp_path / "fused", name, save_original_format=False)
    assert any(key.endswith("gate_up_proj") for key in load_file(fused / "model.safetensors"))
    assert torch.allclose(ours(fused), wanted, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_torch_engine_keeps_the_checkpoints_precision(tmp_path, dtype):
    path = make_model(tmp_path / "m", "qwen3_moe", dtype=dtype)
    assert torch.allclose(ours(path), stock(path), atol=1e-4)


@needs_kernel
def test_the_kernel_says_that_it_rounds_to_bfloat16(tmp_path, kt_log):
    load(make_model(tmp_path / "m", "qwen3_moe", dtype=torch.float32), "AMXBF16", dtype=torch.float32)
    assert "The experts are stored as F32; AMXBF16 computes them in bfloat16" in kt_log.text


def edited(tmp_path, change):
    path = make_model(tmp_path / "m", "deepseek_v2")
    tensors = change(load_file(path / "model.safetensors"))
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    return path


GATE = "model.layers.2.mlp.experts.4.gate_proj.weight"
FUSED = "model.layers.2.mlp.experts.gate_up_proj"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: {k: v for k, v in t.items() if k != GATE}, f"missing 1 expert tensors of layer 2: {GATE}"),
        (lambda t: {k: v for k, v in t.items() if ".layers.1.mlp.experts." not in k}, "missing 18 expert tensors of layer 1: model.layers.1.mlp.experts.0.gate_proj.weight"),
        (lambda t: {**t, GATE: t[GATE][:, :-1].contiguous()}, f"{GATE} has shape (96, 63), config.json asks for (96, 64)"),
        (lambda t: {**t, GATE.replace(".4.", ".6."): t[GATE].clone()}, f"1 expert tensors of layer 2 too many for 6 experts that are stored one by one: {GATE.replace('.4.', '.6.')}"),
        (lambda t: {**t, FUSED: torch.ones(6, 192, 64), FUSED.replace("gate_up", "down"): torch.ones(6, 64, 96)}, "18 expert tensors of layer 2 too many for 6 experts that are stored together"),
        (lambda t: {**t, GATE: t[GATE].to(torch.float8_e4m3fn)}, f"{GATE} is F8_E4M3"),
    ],
)  # fmt: skip
def test_checkpoints_that_cannot_be_right(tmp_path, change, message):
    with pytest.raises(KTModelError) as error:
        load(edited(tmp_path, change), "torch")
    assert message in str(error.value)


def test_truncated_checkpoint(tmp_path):
    path = make_model(tmp_path / "m", "deepseek_v2")
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:10_000])
    with pytest.raises(
        KTModelError, match=r"model\.safetensors cannot be read as safetensors .*; download or copy it again"
    ):
        load(path, "torch")
