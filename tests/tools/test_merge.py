"""``llamafactory-kt merge``: its checkpoint, loaded by stock transformers, against PEFT's merge and a plain float32
sum."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from helpers.adapters import edit_adapter, make_adapter
from helpers.architectures import tiny_model
from helpers.children import KT, child
from helpers.loading import answer
from helpers.loading import load as load_with_engines
from helpers.marks import needs_kernel
from helpers.models import make_model
from helpers.packed import split_experts
from helpers.places import DATA
from helpers.references import merged_float32, per_token, rel
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from llamafactory_kt import KTAdapterError, KTConfigError, KTPathError
from llamafactory_kt.tools.merge import merge_adapter


def state(model) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def load(path, dtype=torch.bfloat16):
    model, info = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    return model


@pytest.mark.parametrize(
    ("architecture", "naming", "save"),
    [
        ("deepseek_v2", "A", {}),
        ("deepseek_v3", "B", {"max_shard_size": "150KB"}),
        ("mixtral", "mixtral", {"max_shard_size": "200KB"}),
        ("qwen3_moe", "B", {"save_original_format": False}),
        ("qwen2_moe", "B", {}),
    ],
)
def test_every_weight_is_the_float32_sum_rounded_once(tmp_path, architecture, naming, save):
    model = make_model(tmp_path / "model", architecture, **save)
    adapter = make_adapter(tmp_path / "adapter", model, rank=5, alpha=7, naming=naming, skip_layers=(1,))
    (tmp_path / "merged").mkdir()
    for name in ("config.json", "stale.safetensors"):  # an earlier output
        (tmp_path / "merged" / name).write_text("{}")
    report = merge_adapter(model, adapter, tmp_path / "merged", overwrite=True)
    wanted, found, before = (
        state(merged_float32(model, adapter, dtype=torch.bfloat16)),
        state(load(tmp_path / "merged")),
        state(load(model)),
    )
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    changed = [name for name in found if not torch.equal(found[name], before[name])]
    assert any(".experts." in name for name in changed) and any("self_attn" in name for name in changed)
    assert report.adapter_tensors == len(load_file(adapter / "adapter_model.safetensors"))
    names = {p.name for p in model.iterdir()}
    assert {p.name for p in (tmp_path / "merged").iterdir()} == names, "same shards, index and configuration files"
    for file in names:
        if file.endswith(".json"):
            assert (tmp_path / "merged" / file).read_bytes() == (model / file).read_bytes()


def test_against_pefts_own_merge(tmp_path):
    """PEFT can merge target_parameters itself; in float32 the two agree to the last bits."""
    base = make_model(tmp_path / "base", "qwen3_moe", dtype=torch.float32)
    from helpers.foreign_adapters import peft_target_parameters

    adapter, reference = peft_target_parameters(tmp_path, base, ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"])
    merge_adapter(base, adapter, tmp_path / "merged")
    wanted, found = state(reference.merge_and_unload()), state(load(tmp_path / "merged", torch.float32))
    assert max(rel(found[name], wanted[name]) for name in wanted) < 1e-6


@pytest.mark.parametrize("source", ["qwen3_moe-tiny-kt-bundle", "qwen3_moe-tiny-target-parameters"])
def test_adapters_of_other_tools(tmp_path, source):
    merge_adapter(DATA / "qwen3_moe-tiny", DATA / source, tmp_path / "merged")
    ids = torch.arange(30, 70)[None]
    base = AutoModelForCausalLM.from_pretrained(DATA / "qwen3_moe-tiny", dtype=torch.float32)
    if source.endswith("parameters"):
        reference = PeftModel.from_pretrained(base, DATA / source)
    else:
        from helpers.foreign_adapters import bundle_reference

        reference = bundle_reference(base, DATA / source)
    with torch.inference_mode():
        wanted = reference(input_ids=ids).logits
        found = load(tmp_path / "merged", torch.float32)(input_ids=ids).logits
        plain = load(DATA / "qwen3_moe-tiny", torch.float32)(input_ids=ids).logits
    assert per_token(found, wanted) < 0.02 and rel(wanted, plain) > 0.03


@needs_kernel
def test_chat_with_adapter_equals_plain_chat_of_the_merged_model(tmp_path, demo):
    from llamafactory.chat import ChatModel

    merge_adapter(demo / "model", demo / "adapter", tmp_path / "merged")
    base = {"template": "deepseek", "do_sample": False}
    merged = ChatModel({**base, "model_name_or_path": str(tmp_path / "merged")})
    ours = ChatModel(
        {
            **base,
            "model_name_or_path": str(demo / "model"),
            "adapter_name_or_path": str(demo / "adapter"),
            "use_kt": True,
        }
    )
    for prompt in ("你好，请介绍一下你自己。", "Hello, who are you?", "What is LoRA?"):
        messages = [{"role": "user", "content": prompt}]
        assert merged.chat(messages)[0].response_text == ours.chat(messages)[0].response_text


def test_saved_modules_replace_the_weight(tmp_path):
    model = make_model(tmp_path / "model", "qwen2_moe")
    adapter = make_adapter(tmp_path / "adapter", model, modules_to_save=["lm_head"])
    head = torch.randn(1024, 64).bfloat16()
    edit_adapter(adapter, lambda t: {**t, "base_model.model.lm_head.weight": head})
    merge_adapter(model, adapter, tmp_path / "merged")
    assert torch.equal(load_file(tmp_path / "merged" / "model.safetensors")["lm_head.weight"], head)


def test_nothing_is_left_of_a_merge_that_fails(tmp_path):
    model = make_model(tmp_path / "model", "deepseek_v2")
    adapter = make_adapter(tmp_path / "adapter", model)
    key = "base_model.model.model.layers.0.self_attn.q_proj.lora_magnitude_vector"
    broken = edit_adapter(make_adapter(tmp_path / "dora", model), lambda t: {**t, key: torch.ones(96)})
    other = make_adapter(tmp_path / "other", make_model(tmp_path / "small", "deepseek_v2", moe_intermediate_size=64))
    for wrong, message in (
        (broken, "is no part of this LoRA: .* says use_dora: false"),
        (other, "LoRA for a weight of 64 x 64, the model's is 96 x 64"),
    ):
        with pytest.raises(KTAdapterError, match=message):
            merge_adapter(model, wrong, tmp_path / "out")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "precious").write_text("")
    with pytest.raises(KTAdapterError, match="exists and is not empty"):
        merge_adapter(model, adapter, tmp_path / "full")
    with pytest.raises(KTAdapterError, match=r"full is not empty and holds no config\.json"):
        merge_adapter(model, adapter, tmp_path / "full", overwrite=True)
    for mine in (model, tmp_path):
        with pytest.raises(KTAdapterError, match=r"is or contains .*, which is read"):
            merge_adapter(model, adapter, mine, overwrite=True)
    (tmp_path / "model" / "config.json").rename(tmp_path / "config.json")
    with pytest.raises(KTPathError, match="is not a model that can be opened"):
        merge_adapter(model, adapter, tmp_path / "out")
    (tmp_path / "config.json").rename(tmp_path / "model" / "config.json")
    with pytest.raises(KTPathError, match="is not a directory with safetensors files"):
        merge_adapter(tmp_path / "nothing", adapter, tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["adapter", "dora", "full", "model", "other", "small"]


def test_command_and_the_way_there_from_export(tmp_path, demo):
    words = ["merge", "--model", demo / "model", "--adapter", demo / "adapter", "--output", tmp_path / "merged"]
    result = child(KT, *words)
    assert result.returncode == 0 and "merged 200 of 200 adapter tensors" in result.stdout, result.stderr
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["model_type"] == "deepseek_v2"
    from llamafactory.hparams import get_infer_args

    arguments = {
        "model_name_or_path": str(demo / "model"),
        "adapter_name_or_path": str(demo / "adapter"),
        "template": "deepseek",
        "use_kt": True,
    }
    with pytest.raises(KTConfigError, match="llamafactory-kt merge --model M --adapter A --output DIR"):
        get_infer_args({**arguments, "kt_backend": "torch", "export_dir": str(tmp_path / "export")})


def test_fused_experts_that_were_split(tmp_path):
    """As a dequantized copy of Qwen3.5's FP8 files may have them. transformers has no rule for these."""
    tiny_model("qwen3_5_moe_text").save_pretrained(tmp_path / "fused")
    shutil.copytree(tmp_path / "fused", tmp_path / "split")
    adapter = make_adapter(tmp_path / "adapter", tmp_path / "fused", rank=5)
    merge_adapter(split_experts(tmp_path / "split"), adapter, tmp_path / "merged")
    wanted, base = (answer(merged_float32(tmp_path / "fused", adapters)) for adapters in (adapter, None))
    found = answer(load_with_engines(tmp_path / "merged", "torch", dtype=torch.float32))
    assert per_token(found, wanted) < 1e-4 < 0.3 < rel(base, wanted)
