"""Checkpoints in every layout, and checkpoints that cannot be right."""

from __future__ import annotations

import pytest
import torch
from helpers.adapters import make_adapter
from helpers.loading import answer, load
from helpers.marks import needs_kernel
from helpers.models import make_model
from helpers.references import merged_float32, per_token
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, conversion_mapping, core_model_loading

from llamafactory_kt import KTModelError, apply_adapter
from llamafactory_kt.adapters import open_adapters
from llamafactory_kt.ground import internals
from llamafactory_kt.tools.merge import merge_adapter
from llamafactory_kt.tools.verify import record_inputs, verify_layers
from llamafactory_kt.tools.verify.reference import Reference


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


@pytest.fixture(params=["Concatenate", "Interleave"])
def stored_otherwise(request, tmp_path, monkeypatch):
    """A checkpoint of Qwen3-MoE, and transformers' rules for it: gate and up of all experts in a tensor each, as in Step-3.7, or their
    rows in turn, as in Inkling."""
    if not hasattr(core_model_loading, request.param):
        pytest.skip("this transformers stores no model like that")
    sources = ["moe.gate_proj", "moe.up_proj"] if request.param == "Concatenate" else ["moe.w13"]
    rules = [
        core_model_loading.WeightConverter(
            sources, "mlp.experts.gate_up_proj", [getattr(core_model_loading, request.param)(dim=1)]
        ),
        core_model_loading.WeightRenaming("moe.down_proj", "mlp.experts.down_proj"),
    ]
    monkeypatch.setattr(conversion_mapping, "_checkpoint_conversion_mapping_cache", None)
    conversion_mapping.register_checkpoint_conversion_mapping("qwen3_moe", rules, overwrite=True)
    path = make_model(tmp_path / "m", "qwen3_moe", dtype=torch.float32, moe_intermediate_size=40)
    assert all(f"model.layers.1.{name}" in load_file(path / "model.safetensors") for name in sources)
    return path


def test_experts_that_transformers_puts_together(stored_otherwise, tmp_path, monkeypatch, kt_log):
    path = stored_otherwise
    monkeypatch.setitem(
        internals.TESTED, "transformers", "<5"
    )  # which adds the check against transformers' own conversion
    assert torch.allclose(ours(path), stock(path), atol=1e-4)
    assert "as they should be" in kt_log.text
    adapter = make_adapter(tmp_path / "a", path)
    wanted = answer(merged_float32(path, adapter))
    assert per_token(wanted, stock(path)) > 0.05
    merge_adapter(path, adapter, tmp_path / "merged")
    assert torch.allclose(stock(tmp_path / "merged"), wanted, atol=1e-4)
    model, _ = apply_adapter(load(path, "torch", dtype=torch.float32, adapter=str(adapter)), adapter)
    assert torch.allclose(answer(model), wanted, atol=1e-4)
    results = verify_layers(model, record_inputs(model, [*range(2, 40)]), Reference(path, open_adapters(adapter)))
    assert all(result.prompt.total < 1e-4 < result.prompt.effect for result in results)


def test_half_of_what_transformers_puts_together_is_missing(stored_otherwise):
    tensors = load_file(stored_otherwise / "model.safetensors")
    removed = next(name for name in tensors if "layers.1.moe" in name and "down" not in name)
    del tensors[removed]
    save_file(tensors, stored_otherwise / "model.safetensors", {"format": "pt"})
    with pytest.raises(KTModelError, match=r"is missing 1 expert tensors of layer 1: model.layers.1.mlp.experts.gate_"):
        ours(stored_otherwise)


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
