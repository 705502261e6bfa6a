"""The part of an adapter that PEFT applies: equal to what stock PEFT makes of the same tensors, and nothing left over."""

from __future__ import annotations

import json

import peft
import pytest
import torch
from helpers.adapters import edit_adapter, make_adapter, make_dora
from helpers.models import make_model, moe_layers, other_modules
from helpers.references import merged_float32, rel
from packaging.version import Version
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from llamafactory_kt import KTAdapterError, KTExpertsConfig, KTModelError, apply_adapter

CASES = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "patterns": {"rank_pattern": {"q_proj": 3, r"layers\.0\.mlp\.up_proj": 2}, "alpha_pattern": {"kv_b_proj": 5, "down_proj": 1}},
}  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("m"), "deepseek_v2")


def kt_model(path, dtype=torch.bfloat16, **keys):
    return AutoModelForCausalLM.from_pretrained(
        path, dtype=dtype, quantization_config=KTExpertsConfig(backend="torch", **keys)
    )


def cut_ranks(pattern):
    """Make the tensors follow a rank pattern."""
    from peft.utils.other import get_pattern_key

    def change(tensors):
        out = {}
        for name, tensor in tensors.items():
            module = name.removeprefix("base_model.model.").split(".lora_")[0]
            rank = pattern.get(get_pattern_key(list(pattern), module))
            cut = tensor if rank is None else tensor[:rank] if "lora_A" in name else tensor[:, :rank]
            out[name] = cut.clone()
        return out

    return change


@pytest.mark.skipif(
    Version(peft.__version__) >= Version("0.19"),
    reason="this PEFT moves the LoRA of a model's dense layers to its experts",
)
@pytest.mark.parametrize("case", CASES)
def test_equal_to_stock_peft(tmp_path, model, case):
    adapter = make_adapter(tmp_path / "whole", model, rank=4, **CASES[case])
    if "rank_pattern" in CASES[case]:
        edit_adapter(adapter, cut_ranks(CASES[case]["rank_pattern"]))
    ours, report = apply_adapter(kt_model(model), adapter)
    assert report.experts + report.peft == report.total == len(load_file(adapter / "adapter_model.safetensors"))

    rest = make_adapter(tmp_path / "rest", model, skip_layers=(0, 1, 2), rank=4, **CASES[case])
    whole = load_file(adapter / "adapter_model.safetensors")
    save_file({n: t for n, t in whole.items() if ".mlp.experts." not in n}, rest / "adapter_model.safetensors")
    stock = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16), rest)
    lora = {name: p for name, p in stock.named_parameters() if "lora_" in name}
    found = {name: p for name, p in ours.named_parameters() if "lora_" in name}
    assert found.keys() == lora.keys() and len(lora) == report.peft
    for name, parameter in lora.items():
        assert torch.equal(found[name], parameter) and found[name].dtype == parameter.dtype
    for name, module in stock.named_modules():
        if hasattr(module, "scaling"):
            assert ours.get_submodule(name).scaling == module.scaling


def test_patterns_reach_experts_too(tmp_path, model):
    """rank_pattern and alpha_pattern with rsLoRA, experts and the rest, against a plain float32 sum."""
    import math

    keys = {
        "use_rslora": True,
        "rank_pattern": {r"experts\.2\.gate_proj": 2},
        "alpha_pattern": {r"experts\.\d+\.down_proj": 3},
    }
    adapter = edit_adapter(
        make_adapter(tmp_path / "a", model, rank=4, alpha=8, **keys), cut_ranks(keys["rank_pattern"])
    )

    def scaling(module, rank):
        alpha = 3 if ".experts." in module and "shared" not in module and module.endswith("down_proj") else 8
        return alpha / math.sqrt(rank)

    ours, _ = apply_adapter(kt_model(model, dtype=torch.float32), adapter)
    ids = torch.arange(2, 40)[None]
    with torch.inference_mode():
        found, wanted = (
            ours(input_ids=ids).logits,
            merged_float32(model, adapter, scaling=scaling)(input_ids=ids).logits,
        )
    assert rel(found, wanted) < 2e-5


def test_attention_scope_leaves_out_shared_and_dense(tmp_path, model, kt_log):
    adapter = make_adapter(tmp_path / "a", model)
    ours, report = apply_adapter(kt_model(model), adapter, scope="attention")
    mlp = [name for name in other_modules(model) if name.endswith(("gate_proj", "up_proj", "down_proj"))]
    assert report.left_out == 2 * len(mlp) and report.peft + report.experts + report.left_out == report.total
    assert not [n for n, _ in ours.named_parameters() if "lora_" in n and ".mlp." in n]
    assert f"leaves out {2 * len(mlp)} of the adapter's {report.total} tensors" in kt_log.text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: {**t, "base_model.model.model.layers.0.self_attn.x_proj.lora_A.weight": torch.ones(2, 2), "base_model.model.model.layers.9.self_attn.q_proj.lora_A.weight": torch.ones(2, 2)}, "2 of 116 tensors belong to no module of DeepseekV2ForCausalLM"),
        (lambda t: {n: v for n, v in t.items() if n != "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"}, "lora_B.weight is missing; the file is incomplete"),
        (lambda t: {**t, "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": torch.ones(8, 63)}, "for a weight of (96, 64)"),
        (lambda t: {**t, "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight": torch.full((8, 64), float("nan"))}, "1 of 114 tensors hold NaN or Inf"),
    ],
)  # fmt: skip
def test_left_over_and_wrong_tensors(tmp_path, model, change, message):
    adapter = edit_adapter(make_adapter(tmp_path / "a", model), change)
    with pytest.raises(KTAdapterError) as error:
        apply_adapter(kt_model(model), adapter)
    assert message in str(error.value) and "adapter_model.safetensors" in str(error.value)


@pytest.mark.parametrize(
    "tensor", ["layers.0.self_attn.x_proj.lora_A.weight", "layers.0.self_attn.q_proj.lora_A.weight"]
)
def test_what_peft_cannot_take_is_refused_before_weights_load(tmp_path, model, capfd, tensor):
    adapter = make_adapter(tmp_path / "a", model)
    edit_adapter(adapter, lambda t: {**t, f"base_model.model.model.{tensor}": torch.ones(8, 63)})
    with pytest.raises(KTAdapterError):
        kt_model(model, adapter=str(adapter))
    assert "Loading" not in capfd.readouterr().err


def test_a_model_that_already_carries_an_adapter(tmp_path, model):
    adapter = make_adapter(tmp_path / "a", model)
    wrapped, _ = apply_adapter(kt_model(model), adapter)
    with pytest.raises(KTModelError, match="already carries an adapter"):
        apply_adapter(wrapped, adapter)


def test_adapter_of_another_model_is_refused_before_weights_load(tmp_path, model, capfd):
    other = make_model(tmp_path / "other", "deepseek_v2", moe_intermediate_size=64)
    adapter = make_adapter(tmp_path / "a", other)
    with pytest.raises(
        KTAdapterError, match="layer 1, expert 0, gate_proj: LoRA for a weight of 64 x 64, the model's is 96 x 64"
    ):
        kt_model(model, adapter=str(adapter))
    assert "Loading" not in capfd.readouterr().err


def test_dora_and_modules_to_save_go_to_peft(tmp_path, model):
    """PEFT's own affair, taken along and consumed."""
    made = make_dora(tmp_path / "a", model)
    ours, report = apply_adapter(kt_model(model, dtype=torch.float32), tmp_path / "a")
    assert report.peft == report.total and report.experts == 0
    ids = torch.arange(2, 30)[None]
    with torch.inference_mode():
        assert rel(ours(input_ids=ids).logits, made(input_ids=ids).logits) < 1e-4


def test_mixtral_names_of_transformers_4(tmp_path):
    model = make_model(tmp_path / "m", "mixtral")
    adapter = make_adapter(tmp_path / "a", model, naming="mixtral")
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert {"w1", "w2", "w3"} < set(config["target_modules"])
    _, report = apply_adapter(kt_model(model), adapter)
    assert report.experts == 3 * 6 * 3 * 2 and report.experts + report.peft == report.total


def test_patterns_are_about_the_names_of_the_files_time(tmp_path):
    """A Mixtral router under its old path, with a rank and an alpha of its own, and an anchored pattern of a layer."""
    model = make_model(tmp_path / "m", "mixtral")
    keys = {
        "rank_pattern": {"block_sparse_moe.gate": 3, r"^model\.layers\.1\.self_attn\.q_proj": 2},
        "alpha_pattern": {"block_sparse_moe.gate": 32, r"layers\.0\.block_sparse_moe\.experts\..*\.w2": 3},
    }
    adapter = make_adapter(tmp_path / "a", model, naming="mixtral", rank=4, alpha=8, **keys)
    generator = torch.Generator().manual_seed(3)

    def add_routers(tensors):
        for layer, (_, experts, hidden, _) in moe_layers(model).items():
            router = f"base_model.model.model.layers.{layer}.block_sparse_moe.gate"
            tensors[f"{router}.lora_A.weight"] = torch.randn(4, hidden, generator=generator) * 0.3
            tensors[f"{router}.lora_B.weight"] = torch.randn(experts, 4, generator=generator) * 0.3
        return cut_ranks(keys["rank_pattern"])(tensors)

    edit_adapter(adapter, add_routers)

    def scaling(module, rank):
        old_down = "layers.0." in module and module.endswith(".w2")
        return (32 if module.endswith("gate") else 3 if old_down else 8) / rank

    ours, report = apply_adapter(kt_model(model, dtype=torch.float32), adapter)
    assert report.peft + report.experts == report.total
    ids = torch.arange(2, 40)[None]
    with torch.inference_mode():
        wanted = merged_float32(model, adapter, scaling=scaling)(input_ids=ids).logits
        assert rel(ours(input_ids=ids).logits, wanted) < 2e-5
        assert rel(merged_float32(model, adapter)(input_ids=ids).logits, wanted) > 0.05
