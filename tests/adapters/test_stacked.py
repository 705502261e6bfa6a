"""Layouts with one stacked tensor for all experts of a layer: the official stack's bundle, and moe_lora.pt."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from helpers.adapters import make_adapter
from helpers.expert_tensors import Hostile
from helpers.foreign_adapters import (
    BUNDLE,
    bundle_reference,
    copied,
    moe_lora_of,
    ours,
    stock,
)
from helpers.loading import logits
from helpers.models import make_model
from helpers.references import rel
from safetensors.torch import load_file, save_file

from llamafactory_kt import KTAdapterError, KTPathError
from llamafactory_kt.adapters import open_adapter


def test_bundle_of_the_official_stack(kt_log):
    """The official forks trained it; its manifest names a base path on another machine, and its router has LoRA."""
    model, report = ours(BUNDLE)
    wanted = logits(bundle_reference(stock(), BUNDLE))
    assert rel(wanted, logits(stock())) > 0.01
    assert rel(logits(model), wanted) < 2e-5
    files = ("adapter_model.safetensors", "fused_expert_lora.safetensors")
    assert report.total == report.experts + report.peft == sum(len(load_file(BUNDLE / file)) for file in files)
    assert report.format == "KT bundle" and "Added the LoRA of 3 routers" in kt_log.text


def test_bundle_without_manifest_and_with_a_broken_one(tmp_path):
    adapter = copied(tmp_path)
    manifest = json.loads((adapter / "kt_adapter_manifest.json").read_text())
    wanted = logits(ours(adapter)[0])

    def with_manifest(change):
        broken = json.loads(json.dumps(manifest))
        change(broken)
        (adapter / "kt_adapter_manifest.json").write_text(json.dumps(broken))
        with pytest.raises(KTAdapterError) as error:
            open_adapter(adapter)
        return str(error.value)

    fused = manifest["artifacts"]["fused_expert_lora.safetensors"]
    assert "size or SHA-256 differ" in with_manifest(
        lambda m: m["artifacts"]["fused_expert_lora.safetensors"].update(sha256="0" * 64)
    )
    assert "size or SHA-256 differ" in with_manifest(lambda m: m["artifacts"]["adapter_config.json"].update(size=1))
    assert "not a file beside it" in with_manifest(lambda m: m["artifacts"].update({"../../etc/passwd": fused}))
    assert "found 1 and 'writing'" in with_manifest(lambda m: m.update(status="writing"))
    assert "alpha is 99" in with_manifest(lambda m: m.update(lora={"rank": 8, "alpha": 99}))
    assert "is not a KT adapter manifest" in with_manifest(lambda m: m.pop("artifacts"))
    (adapter / "kt_adapter_manifest.json").unlink()
    assert torch.equal(logits(ours(adapter)[0]), wanted)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: {k: v for k, v in t.items() if k != "layers.1.experts.up_lora_b"}, "layer 1 has no up_lora_b"),
        (lambda t: {**t, "layers.1.experts.up_lora_b": t["layers.1.experts.up_lora_b"][:, :, :4].contiguous()}, "layer 1, up: a has shape (8, 8, 128) and b (8, 64, 4)"),
        (lambda t: {**t, "layers.1.experts.other": torch.ones(1)}, "the tensor layers.1.experts.other is not one of this format's"),
        (lambda t: {k.replace("layers.2", "layers.7"): v for k, v in t.items()}, "layer 7 has expert LoRA, but the model's layers"),
        (lambda t: {k: v[:6].contiguous() for k, v in t.items()}, "layer 0, gate_proj: LoRA for 6 experts of 64 x 128, the model's are 8"),
        (lambda t: {**t, "layers.0.experts.up_lora_a": t["layers.0.experts.up_lora_a"] * float("nan")}, "hold NaN or Inf"),
    ],
)  # fmt: skip
def test_broken_bundles(tmp_path, change, message):
    adapter = copied(tmp_path)
    (adapter / "kt_adapter_manifest.json").unlink()
    file = adapter / "fused_expert_lora.safetensors"
    save_file(change(load_file(file)), file)
    with pytest.raises(KTAdapterError) as error:
        ours(adapter)
    assert message in str(error.value)


def test_moe_lora_beside_an_adapter_and_alone(tmp_path):
    wanted = logits(ours(BUNDLE)[0])
    adapter = copied(tmp_path)
    moe_lora_of(BUNDLE, adapter / "moe_lora.pt")
    for name in ("kt_adapter_manifest.json", "fused_expert_lora.safetensors"):
        (adapter / name).unlink()
    assert torch.equal(logits(ours(adapter)[0]), wanted)
    (adapter / "moe_lora.pt").rename(tmp_path / "elsewhere.pt")
    opened = open_adapter(adapter, tmp_path / "elsewhere.pt")
    assert opened.layers == [0, 1, 2] and opened.scaling(0) == 2.0 and len(opened.other_names) > 0
    alone = tmp_path / "alone"
    alone.mkdir()
    (tmp_path / "elsewhere.pt").rename(alone / "moe_lora.pt")
    model, report = ours(alone)
    assert report.total == report.experts == 18 and not hasattr(model, "peft_config")
    with pytest.raises(KTPathError, match=r"missing\.pt does not exist"):
        open_adapter(adapter, tmp_path / "missing.pt")


@pytest.mark.parametrize("content", [{"metadata": {}, "layer_0": Hostile()}, {"layer_0": {}}, {"metadata": {}, "layer_0": 3}, {"metadata": {"lora_rank": "8"}, "layer_0": {}}])  # fmt: skip
def test_moe_lora_that_is_something_else(tmp_path, monkeypatch, content):
    monkeypatch.chdir(tmp_path)
    torch.save(content, tmp_path / "moe_lora.pt")
    with pytest.raises(KTAdapterError, match=r"moe_lora\.pt"):
        open_adapter(tmp_path)
    assert not (tmp_path / "hostile-code-was-run").exists()


def test_experts_given_twice_by_key(tmp_path):
    with pytest.raises(KTAdapterError, match="was given twice"):
        open_adapter(BUNDLE, moe_lora_of(BUNDLE, tmp_path / "experts.pt"))


def test_experts_twice(tmp_path, kt_log):
    base = make_model(tmp_path / "m", "qwen3_moe")
    adapter = make_adapter(tmp_path / "adapter", base)
    moe_lora_of(BUNDLE, adapter / "moe_lora.pt")
    assert open_adapter(adapter).format == "per-expert LoRA tensors" and "moe_lora.pt is not used" in kt_log.text
    assert open_adapter(BUNDLE).layers == [0, 1, 2]
    shutil.copy(BUNDLE / "fused_expert_lora.safetensors", adapter)
    with pytest.raises(KTAdapterError, match="holds routed-expert LoRA twice"):
        open_adapter(adapter)
