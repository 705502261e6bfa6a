"""Opening a checkpoint by its headers, and checking adapters against it, where no tool's own test does."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from helpers.adapters import edit_adapter, make_adapter
from helpers.fp8 import make_fp8
from helpers.models import make_model, moe_layers
from transformers import AutoModelForCausalLM

from llamafactory_kt import KTAdapterError, KTExpertsConfig, KTModelError, KTPathError
from llamafactory_kt.adapters import ExpertsShape, open_adapter, open_adapters
from llamafactory_kt.checkpoint.opening import MoEModel, empty_model, fit_adapters, open_checkpoint, weight_files
from llamafactory_kt.model.state import kt_state


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("m") / "model", "deepseek_v2", max_shard_size="200KB")


@pytest.fixture(scope="module")
def adapter(model):
    return make_adapter(model.parent / "adapter", model)


def test_what_a_checkpoint_is_opened_to(model):
    moe = open_checkpoint(model)
    assert all(parameter.is_meta for parameter in moe.model.parameters())
    expected = {layer: ExpertsShape(*sizes) for layer, (_, *sizes) in moe_layers(model).items()}
    assert moe.shapes == expected and list(moe.shapes) == [1, 2], "layer 0 is dense"
    assert len(moe.files) > 3 and moe.files == sorted(model.glob("*.safetensors"))
    assert set(moe.layout.names()) == {module.name for module in moe.experts}
    assert moe.layout is moe.layout, "located once"


def test_files_beside_those_of_the_index_are_not_read(model, tmp_path):
    path = shutil.copytree(model, tmp_path / "m")
    (path / "training_state.safetensors").write_bytes(b"nothing of the model")
    assert [file.name for file in weight_files(path)] == [file.name for file in weight_files(model)]
    assert open_checkpoint(path).layout.dtypes() == {"BF16"}


def test_home_is_understood(model, monkeypatch):
    monkeypatch.setenv("HOME", str(model.parent))
    assert open_checkpoint("~/model").files == weight_files(model)


def test_no_files(model, tmp_path):
    for directory in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(KTPathError, match="is not a directory with safetensors files"):
            open_checkpoint(directory)
    shutil.copy(model / "config.json", tmp_path)
    moe = MoEModel(empty_model(tmp_path))
    assert moe.shapes == open_checkpoint(model).shapes, "config.json is enough for the sizes"
    with pytest.raises(KTModelError, match="experts are read from checkpoint files, and there are none"):
        _ = moe.layout


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("{", "model.safetensors.index.json is not valid JSON"),
        ('{"weight_map": ["a"]}', "model.safetensors.index.json is not a safetensors index"),
        ('{"weight_map": {"a": "no.safetensors"}}', "names the shard 'no.safetensors', which is not a file beside it"),
        ('{"weight_map": {"a": "../m/config.json"}}', "names the shard '../m/config.json'"),
    ],
)
def test_a_wrong_index(model, tmp_path, index, message):
    path = shutil.copytree(model, tmp_path / "m")
    (path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(KTModelError, match=message):
        open_checkpoint(path)


def test_quantized_checkpoints_are_opened_where_they_may_be(tmp_path):
    fp8, _ = make_fp8(tmp_path / "fp8", make_model(tmp_path / "m", "deepseek_v2", dtype=torch.float32), [32, 48])
    with pytest.raises(
        KTModelError, match=r"is a quantized checkpoint \(FP8\); bfloat16, float16 or float32 weights are needed"
    ):
        open_checkpoint(fp8)
    moe = open_checkpoint(fp8, quantized=True)
    assert moe.layout.format.block == (32, 48) and moe.layout.dtypes() == {"F8_E4M3"}
    config = json.loads((fp8 / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "hqq"}
    (fp8 / "config.json").write_text(json.dumps(config))
    assert MoEModel(empty_model(fp8, quantized=True)).shapes == moe.shapes, "no weights are read"
    with pytest.raises(KTModelError, match=r"is a quantized checkpoint .quant_method: hqq"):
        _ = open_checkpoint(fp8, quantized=True).layout


def test_an_adapter_that_fits(model, adapter):
    adapters = open_adapters([adapter, adapter])
    parts = open_checkpoint(model).fit(adapters, finite=True)
    assert [a for a, _ in parts] == list(adapters.adapters)
    assert all(part.tensors == a.other_names and not part.left_out for a, part in parts)
    narrow = open_checkpoint(model).fit(adapters, "attention")
    assert all(part.left_out and len(part.tensors) + len(part.left_out) == len(a.other_names) for a, part in narrow)


EXPERT = "base_model.model.model.layers.2.mlp.experts.4.up_proj.lora_A.weight"
OTHER = "base_model.model.model.layers.0.self_attn.o_proj.lora_B.weight"
STRANGE = "base_model.model.model.layers.0.self_attn.strange_proj.lora_B.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: {**t, OTHER: t[OTHER][:-1].contiguous()}, r"LoRA of \(8, 64\) and \(63, 8\)"),
        (lambda t: {**t, STRANGE: t[OTHER].clone()}, f"belong to no module of DeepseekV2ForCausalLM, first {STRANGE}"),
    ],
)
def test_pefts_part_is_checked_by_headers(model, tmp_path, change, message):
    broken = edit_adapter(make_adapter(tmp_path / "a", model), change)
    with pytest.raises(KTAdapterError, match=message):
        open_checkpoint(model).fit(open_adapters(broken))


def test_the_experts_part_is_checked_by_headers(model, tmp_path):
    smaller = make_model(tmp_path / "m", "deepseek_v2", moe_intermediate_size=64)
    with pytest.raises(KTAdapterError, match="LoRA for a weight of 64 x 64, the model's is 96 x 64"):
        open_checkpoint(model).fit(open_adapters(make_adapter(tmp_path / "a", smaller)))


@pytest.mark.parametrize("name", [EXPERT, OTHER])
def test_values_are_read_only_if_asked_for(model, tmp_path, name):
    broken = edit_adapter(make_adapter(tmp_path / "a", model), lambda t: {**t, name: t[name] * float("nan")})
    moe, adapters = open_checkpoint(model), open_adapters(broken)
    assert len(moe.fit(adapters)) == 1
    with pytest.raises(KTAdapterError, match=f"tensors hold NaN or Inf, first {name}"):
        moe.fit(adapters, finite=True)


def test_a_model_whose_experts_are_replaced(model, adapter):
    loaded = AutoModelForCausalLM.from_pretrained(model, quantization_config=KTExpertsConfig(backend="torch"))
    shapes = {wrapper.info.layer: wrapper.info.shape for wrapper in kt_state(loaded).wrappers}
    [(opened, part)] = fit_adapters(loaded, shapes, open_adapters(adapter))
    assert part.tensors == open_adapter(adapter).other_names == opened.other_names
    with pytest.raises(KTAdapterError, match="layer 2"):
        fit_adapters(loaded, {1: shapes[1]}, open_adapters(adapter))


def test_a_value_that_the_configuration_refuses(tmp_path):
    """transformers checks types by an error that is no ValueError."""
    (tmp_path / "config.json").write_text('{"model_type": "qwen3_moe", "num_experts_per_tok": 3.5}')
    with pytest.raises(KTPathError, match=r"is not a model that can be opened: .*num_experts_per_tok.* expected int"):
        empty_model(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", '{"model_type": ["qwen3_moe"]}'])
def test_what_is_no_configuration(tmp_path, text):
    with pytest.raises(KTPathError, match=r"is not a model that can be opened: it has no config\.json\."):
        empty_model(tmp_path)
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(KTPathError, match="is not a model that can be opened"):
        empty_model(tmp_path)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"hidden_act": "nonsense"}, r"config.json has hidden_act: 'nonsense', which is no activation .* gelu_new, .* silu,"),
        ({"moe_intermediate_size": -4}, "transformers cannot build qwen3_moe from config.json: RuntimeError: Trying to create tensor"),
        (
            {"model_type": "kimi_k2", "architectures": ["DeepseekV3ForCausalLM"]},
            """has the model_type 'kimi_k2', .* DeepseekV3ForCausalLM, is its 'deepseek_v3'. Write "model_type": "deepseek_v3" in""",
        ),
    ],
)  # fmt: skip
def test_a_configuration_that_transformers_builds_nothing_from(tmp_path, config, message):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen3_moe", **config}))
    with pytest.raises(KTModelError, match=message):
        empty_model(tmp_path)


def test_an_activation_of_a_part(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "qwen3_vl_moe", "text_config": {"hidden_act": "nonsense"}}')
    with pytest.raises(KTModelError, match=r"config.json has text_config\.hidden_act: 'nonsense'"):
        empty_model(tmp_path)
