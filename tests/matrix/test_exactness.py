"""Are the numbers right with the installed libraries? A part of the gate, and all that ``make test MATRIX=...`` runs elsewhere.

Each test records how far it was from float32, and, in bfloat16, how far stock transformers was; ``run.py`` makes a table of that.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
from helpers.adapters import make_adapter
from helpers.chats import chat_model
from helpers.foreign_adapters import BUNDLE, bundle_reference, copied, moe_lora_of, stock
from helpers.loading import load, logits
from helpers.marks import FASTEST
from helpers.models import ARCHITECTURES, make_model
from helpers.places import DATA
from helpers.references import merged_float32, per_token, rel
from packaging.version import Version
from peft import __version__ as peft_version
from safetensors.torch import load_file
from transformers import CONFIG_MAPPING

from llamafactory_kt import apply_adapter
from llamafactory_kt.adapters.opening import open_adapter
from matrix.record import ADAPTERS, BASE, EVERY, IDS, LOGITS, record

EXACT = 1e-5
SPARSE = {
    "index_topk": 4,
    "index_head_dim": 16,
    "index_n_heads": 2,
    "q_lora_rank": 24,
    "mlp_layer_types": ["dense", "sparse", "sparse"],
}
"""attention to 4 tokens of the 20: a mask that is left out changes everything"""
NEWER = {
    name: {**ARCHITECTURES["deepseek_v3"], **SPARSE} for name in ("glm_moe_dsa", "deepseek_v32")
}  # fmt: skip
RECORDED = sorted(file.parent for file in DATA.glob(f"peft-*/*/{LOGITS}"))


def with_chat(model: Path, adapter: Path, engine: str, dtype: torch.dtype) -> torch.Tensor:
    """The logits of a model that LLaMA-Factory loaded; of one from Python, where a row has no LLaMA-Factory."""
    if importlib.util.find_spec("llamafactory"):
        return logits(chat_model(model, adapter, kt_backend=engine).engine.model)
    return logits(apply_adapter(load(model, engine, dtype=dtype, adapter=str(adapter)), adapter)[0])


@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v3", "glm4_moe", "mixtral", "qwen2_moe", *NEWER])
def test_architecture(tmp_path, record_property, name):
    """LoRA on attention, dense layers, shared experts and each routed expert, loaded by LLaMA-Factory."""
    if name not in CONFIG_MAPPING:
        pytest.skip(f"this transformers has no {name}")
    path = make_model(tmp_path / "model", name, dtype=torch.float32, **NEWER.get(name, {}))
    adapter = make_adapter(
        tmp_path / "adapter",
        path,
        rank=5,
        alpha=15,
        naming="mixtral" if name == "mixtral" else "B",
        dtype=torch.float32,
    )
    wanted = logits(merged_float32(path, adapter))
    assert rel(wanted, logits(merged_float32(path, None))) > 0.1, "the adapter must change something"
    error = rel(with_chat(path, adapter, "torch", torch.float32), wanted)
    record_property("float32", error)
    assert error < EXACT


@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v3"])
def test_bfloat16(tmp_path, record_property, name):
    """The engine that this machine would use, beside stock transformers in bfloat16."""
    path = make_model(tmp_path / "model", name)
    adapter = make_adapter(tmp_path / "adapter", path, rank=5, alpha=15)
    wanted = logits(merged_float32(path, adapter))
    noise = per_token(logits(merged_float32(path, adapter, dtype=torch.bfloat16)), wanted)
    error = per_token(with_chat(path, adapter, FASTEST, torch.bfloat16), wanted)
    record_property("bfloat16", error / noise)
    assert error < 2 * noise


def test_the_official_bundle_and_moe_lora(tmp_path, record_property):
    """The official stack's bundle, and the same experts as the converter for SGLang writes them."""
    wanted = logits(bundle_reference(stock(), BUNDLE))
    bundle, _ = apply_adapter(load(BASE, "torch", dtype=torch.float32), BUNDLE)
    error = rel(logits(bundle), wanted)
    record_property("float32", error)
    assert error < EXACT
    apart = copied(tmp_path)
    moe_lora = moe_lora_of(BUNDLE, tmp_path / "experts.pt")
    for name in ("kt_adapter_manifest.json", "fused_expert_lora.safetensors"):
        (apart / name).unlink()
    model, _ = apply_adapter(load(BASE, "torch", dtype=torch.float32), open_adapter(apart, moe_lora))
    assert torch.equal(logits(model), logits(bundle))


@pytest.mark.parametrize("adapter", RECORDED, ids=lambda path: f"{path.parent.name}-{path.name}")
def test_saved_by_another_peft(record_property, adapter):
    """Adapters of PEFT 0.18.1 and 0.21.2, against what that PEFT answered itself."""
    model, report = apply_adapter(load(BASE, "torch", dtype=torch.float32, adapter=str(adapter)), adapter)
    assert report.experts + report.peft == report.total == len(load_file(adapter / "adapter_model.safetensors"))
    with torch.inference_mode():
        found = model(input_ids=IDS).logits[:, ::EVERY]
    error = rel(found, load_file(adapter / LOGITS)["logits"])
    record_property("float32", error)
    assert error < EXACT


@pytest.mark.parametrize("name", ADAPTERS)
def test_saved_by_this_peft(tmp_path, record_property, name):
    """Against its own forward; with hidden and intermediate sizes that the shapes tell apart, and with those that they do not."""
    if name == "old-names" and Version(peft_version) < Version("0.19"):
        pytest.skip("this PEFT does not translate names")
    for size in (40, 36):
        base = make_model(tmp_path / f"model-{size}", "qwen3_moe", dtype=torch.float32, moe_intermediate_size=size)
        wanted = record(tmp_path / f"adapter-{size}", base, **ADAPTERS[name])
        model, _ = apply_adapter(load(base, "torch", dtype=torch.float32), tmp_path / f"adapter-{size}")
        with torch.inference_mode():
            error = rel(model(input_ids=IDS).logits, wanted)
        record_property("float32", error)
        assert error < EXACT
