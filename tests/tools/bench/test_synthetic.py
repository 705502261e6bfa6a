"""Models and adapters that are made up, with published sizes."""

from __future__ import annotations

import pytest
import torch
from helpers.models import ARCHITECTURES
from transformers import AutoModelForCausalLM

from llamafactory_kt import KTConfigError, KTModelError
from llamafactory_kt.adapters import open_adapters
from llamafactory_kt.checkpoint.discovery import find_experts
from llamafactory_kt.peft_side.split import check_peft_part
from llamafactory_kt.tools.bench import synthetic
from llamafactory_kt.tools.bench.shapes import ModelShape, parse_shape
from llamafactory_kt.tools.bench.synthetic import SyntheticModel


@pytest.mark.parametrize(
    ("name", "parameters"),  # as published
    [
        ("deepseek-v2-lite", 15_706_484_224),
        ("qwen3-30b-a3b", 30_532_122_624),
        ("mixtral-8x7b", 46_702_792_704),
        ("deepseek-v3", 671_026_419_200),
    ],
)
def test_synthetic_sizes_are_the_published_ones(name, parameters):
    assert SyntheticModel.of(parse_shape(name)).weights.total == 2 * parameters


def test_synthetic_names():
    assert parse_shape("DeepSeek-V2-Lite:4").name == "deepseek-v2-lite-4"
    with pytest.raises(KTConfigError, match="unknown model 'deepseek-v2', expected deepseek-v2-lite, deepseek-v3"):
        parse_shape("deepseek-v2:4")
    for wrong in ("3", "62", "x", ""):
        with pytest.raises(
            KTConfigError, match=rf"4 to 61 layers \(its first 3 have no routed experts\), found '{wrong}'"
        ):
            parse_shape(f"deepseek-v3:{wrong}")


@pytest.mark.parametrize(
    ("name", "experts", "key"),
    [
        ("qwen3-30b-a3b", 8, "num_experts"),
        ("deepseek-v2-lite", 6, "n_routed_experts"),
        ("mixtral-8x7b", 2, "num_local_experts"),
        ("deepseek-v3", 16, "n_routed_experts"),
    ],
)
def test_fewer_experts(name, experts, key):
    """The least that a token can choose from; all other sizes stay."""
    fewer, whole = parse_shape(name, experts), parse_shape(name)
    assert fewer.values == {**whole.values, key: experts} and fewer.name == f"{whole.name}x{experts}"
    assert parse_shape(name, whole.values[key]).values == whole.values
    small, large = (SyntheticModel.of(shape).weights for shape in (fewer, whole))
    assert small.experts * whole.values[key] == large.experts * experts
    for wrong in (experts - 1, 0, whole.values[key] + experts):
        with pytest.raises(
            KTConfigError, match=rf"--experts: {name} takes {experts} to \d+ experts.*, found {wrong}\."
        ):
            parse_shape(name, wrong)


def test_experts_in_groups():
    with pytest.raises(KTConfigError, match=r"takes 16 to 256 experts, in steps of 8 \(a token chooses 8\), found 20"):
        parse_shape("deepseek-v3:4", 20)


def tiny(architecture: str) -> SyntheticModel:
    values = {key: value for key, value in ARCHITECTURES[architecture].items() if not key.endswith("token_id")}
    return SyntheticModel.of(ModelShape("tiny-3", architecture, values))


@pytest.mark.parametrize("architecture", ["deepseek_v2", "deepseek_v3", "mixtral", "qwen3_moe"])
def test_synthetic_models_are_complete(tmp_path, monkeypatch, architecture):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(synthetic, "_POOL", 2**12)  # smaller than a tensor, as with real sizes
    made = tiny(architecture)
    assert not made.directory.exists(), "sizes alone write nothing"
    chat = made.build()
    assert chat == tmp_path / "llamafactory-kt" / "synthetic" / "tiny-3" / "chat.yaml"
    assert sorted(path.name for path in made.directory.iterdir()) == ["adapter", "chat.yaml", "model"]
    loaded, info = AutoModelForCausalLM.from_pretrained(made.model, dtype=torch.bfloat16, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert made.weights.total == sum(2 * t.numel() for t in loaded.state_dict().values())
    assert loaded.get_input_embeddings().weight.detach().float().std().item() == pytest.approx(1, rel=0.1), (
        "as large as what layers add"
    )
    ids = torch.arange(40)[None]
    with torch.no_grad():
        assert loaded(ids).logits.isfinite().all()
    adapters = open_adapters([made.adapter])
    modules = find_experts(loaded)
    adapters.check_fits({module.layer: module.shape for module in modules})
    assert adapters.layers == [module.layer for module in modules]
    assert check_peft_part(loaded, adapters.adapters[0]).tensors == adapters.adapters[0].other_names
    experts = [made.tensors[n] for n in made.tensors if ".experts." in n]
    assert len(adapters.adapters[0].expert_names) == 2 * len(experts) == 2 * 3 * 6 * len(modules)
    stamps = {path: path.stat().st_mtime_ns for path in made.directory.glob("*/*")}
    made.build()
    assert stamps == {path: path.stat().st_mtime_ns for path in made.directory.glob("*/*")}, "made once"


def test_synthetic_is_not_half_written(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    made = tiny("mixtral")
    monkeypatch.setattr(synthetic.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1000}))
    with pytest.raises(KTModelError, match=r"takes \d.* MiB, and 1.0 KiB are free.*XDG_CACHE_HOME"):
        made.build()
    monkeypatch.undo()
    monkeypatch.setattr(synthetic, "_byte_tokenizer", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        made.build()
    assert not list(made.directory.iterdir())
