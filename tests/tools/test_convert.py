"""The converter: its original behaviour, its round trips, and outputs that other tools read."""

from __future__ import annotations

import json
import os

import pytest
import torch
from helpers.adapters import edit_adapter, make_adapter, write_config
from helpers.children import KT, child
from helpers.models import make_model, moe_layers
from helpers.places import DATA
from helpers.references import merged_float32, rel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from llamafactory_kt import KTAdapterError, KTConfigError, KTExpertsConfig, KTPathError, apply_adapter
from llamafactory_kt.adapters import ExpertsShape, open_adapter, open_files
from llamafactory_kt.tools.convert import convert_peft_to_kt_format, parse_moe_key

os.umask(UMASK := os.umask(0o022))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("m"), "deepseek_v2")


@pytest.fixture
def adapter(tmp_path, model):
    return make_adapter(tmp_path / "adapter", model, rank=4, alpha=12, naming="A")


def test_parse_moe_key():
    key = "base_model.model.model.layers.1.mlp.{}experts.5.gate_proj.lora_{}.weight"
    assert parse_moe_key(key.format("original_moe.", "A")) == (1, 5, "gate", "a")
    assert parse_moe_key(key.format("", "B")) == (1, 5, "gate", "b")
    assert parse_moe_key("base_model.model.model.layers.1.mlp.shared_experts.gate_proj.lora_A.weight") is None


def test_moe_lora_pt(tmp_path, model, adapter, kt_log):
    """Names, shapes and values of the output, compared with the tensors that went in; the log lines and the result."""
    file, config, output = (
        adapter / "adapter_model.safetensors",
        adapter / "adapter_config.json",
        tmp_path / "moe_lora.pt",
    )
    result = convert_peft_to_kt_format(input_path=str(file), output_path=str(output), config_path=str(config))
    wanted = {
        "status": "success",
        "num_layers": 3,
        "num_experts": 6,
        "lora_rank": 4,
        "lora_alpha": 12.0,
        "total_keys": 72,
    }
    assert result == wanted
    messages = [record.getMessage() for record in kt_log.records]
    assert messages == [
        f"Loading adapter from: {file}", "Found 72 MoE expert LoRA keys", f"Saving to: {output}", f"Conversion complete: {wanted}",
    ]  # fmt: skip
    content = torch.load(output, weights_only=True)
    assert content["metadata"] == {
        "lora_rank": 4, "lora_alpha": 12.0, "num_experts": 6, "num_layers": 3, "hidden_size": 64, "intermediate_size": 96,
    }  # fmt: skip
    assert sorted(content) == ["layer_1", "layer_2", "metadata"]
    assert content["layer_1"]["gate_lora_a"].shape == (6, 4, 64) and content["layer_1"]["gate_lora_b"].shape == (
        6,
        96,
        4,
    )
    assert content["layer_1"]["down_lora_a"].shape == (6, 4, 96) and content["layer_1"]["down_lora_b"].shape == (
        6,
        64,
        4,
    )
    seen = 0
    for name, tensor in load_file(file).items():
        if place := parse_moe_key(name):
            layer, expert, projection, side = place
            assert torch.equal(content[f"layer_{layer}"][f"{projection}_lora_{side}"][expert], tensor)
            seen += 1
    assert seen == 72


@pytest.mark.parametrize("naming", ["A", "B"])
@pytest.mark.parametrize(
    "target", ["moe_lora.pt", "stacked.safetensors", "peft", "kt-bundle", "sglang", "sglang-merged"]
)
def test_round_trips_are_exact(tmp_path, model, naming, target):
    source = make_adapter(tmp_path / "source", model, rank=4, alpha=12, naming=naming)
    output = tmp_path / target
    convert_peft_to_kt_format(source, output, format=None if output.suffix else target)
    if target == "stacked.safetensors":
        names = load_file(output)
        assert len(names) == 12 and names["layers.2.experts.up_lora_b"].shape == (6, 96, 4)
    opened = open_files(output, None, 1.0) if output.suffix else open_adapter(output)
    for file in [output] if output.is_file() else output.iterdir():
        assert file.stat().st_mode & 0o777 == 0o666 & ~UMASK, "readable as any new file is"
    wanted = open_adapter(source)
    for layer, (_, experts, hidden, intermediate) in moe_layers(model).items():
        shape = ExpertsShape(experts, hidden, intermediate)
        one, other = opened.read_layer(layer, shape), wanted.read_layer(layer, shape)
        for p in ("gate", "up", "down"):
            assert torch.equal(one.a[p], other.a[p]) and torch.equal(one.b[p], other.b[p])
            assert torch.equal(one.scaling[p], other.scaling[p])
    if target in ("peft", "kt-bundle"):
        for name in wanted.other_names:
            assert torch.equal(opened.read(name), wanted.read(name))


@torch.inference_mode()
def logits(path, adapter):
    config = KTExpertsConfig(backend="torch", adapter=str(adapter))
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, quantization_config=config)
    return apply_adapter(model, adapter)[0](input_ids=torch.arange(2, 40)[None]).logits


def test_patterns_and_rslora_are_folded_in(tmp_path, model):
    """Different ranks and scalings, into layouts with one of each: the logits equal a plain float32 sum."""
    import math

    keys = {"use_rslora": True, "alpha_pattern": {r"experts\.\d+\.down_proj": 3, "kv_b_proj": 5}}
    source = make_adapter(tmp_path / "source", model, rank=4, alpha=8, **keys)

    def scaling(module, rank):
        alpha = 5 if "kv_b_proj" in module else 3 if ".mlp.experts." in module and "down_proj" in module else 8
        return alpha / math.sqrt(rank)

    with torch.inference_mode():
        wanted = merged_float32(model, source, scaling=scaling)(input_ids=torch.arange(2, 40)[None]).logits
    result = convert_peft_to_kt_format(source, tmp_path / "peft", format="peft")
    assert result["status"] == "success"
    assert rel(logits(model, tmp_path / "peft"), wanted) < 2e-5
    convert_peft_to_kt_format(source, tmp_path / "merged", format="sglang-merged")
    assert json.loads((tmp_path / "merged" / "adapter_config.json").read_text())["use_rslora"] is False
    assert rel(logits(model, tmp_path / "merged"), wanted) < 2e-5
    with pytest.raises(KTAdapterError, match=r"one rank and one alpha for experts and the rest.*with rsLoRA"):
        convert_peft_to_kt_format(source, tmp_path / "bundle", format="kt-bundle")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["merged", "peft", "source"], "no output, not even a part"


@pytest.mark.parametrize(
    "config", [{"alpha_pattern": {"gate_proj": 32}}, {"alpha_pattern": {"up_proj": 3}, "use_rslora": True}]
)
def test_patterns_that_mean_experts_and_others_alike(tmp_path, model, config):
    """A bare name in a pattern is folded into the experts once, and still applies to shared experts and dense layers."""
    import math

    source = make_adapter(tmp_path / "source", model, rank=4, alpha=16, **config)
    name, alpha = next(iter(config["alpha_pattern"].items()))

    def scaling(module, rank):
        return (alpha if module.endswith(name) else 16) / (math.sqrt(rank) if config.get("use_rslora") else rank)

    with torch.inference_mode():
        wanted = merged_float32(model, source, scaling=scaling)(input_ids=torch.arange(2, 40)[None]).logits
    for format in ("peft", "sglang-merged"):
        convert_peft_to_kt_format(source, tmp_path / format, format=format)
        assert rel(logits(model, tmp_path / format), wanted) < 2e-5


def test_stacked_output_beside_the_adapter_it_came_from(tmp_path, model):
    """Its own rank and alpha count, not those of a configuration beside it; --config must not contradict them."""
    source = make_adapter(tmp_path / "source", model, rank=4, alpha=16, use_rslora=True)
    convert_peft_to_kt_format(source, source / "experts.safetensors")
    assert convert_peft_to_kt_format(source / "experts.safetensors", tmp_path / "o.pt")["lora_alpha"] == 32.0
    with pytest.raises(KTAdapterError, match="was written with lora_rank 4 and lora_alpha 32"):
        convert_peft_to_kt_format(
            source / "experts.safetensors", tmp_path / "p.pt", config_path=source / "adapter_config.json"
        )


@pytest.mark.parametrize("source", ["qwen3_moe-tiny-kt-bundle", "qwen3_moe-tiny-target-parameters"])
def test_adapters_of_other_tools_into_peft(tmp_path, source):
    convert_peft_to_kt_format(DATA / source, tmp_path / "peft", format="peft")
    base = DATA / "qwen3_moe-tiny"
    assert rel(logits(base, tmp_path / "peft"), logits(base, DATA / source)) < 2e-5


def test_sglang_directories_equal_those_of_kt_kernels_own_converter(tmp_path):
    """kt-kernel converts its bundles for SGLang, expert-only and merged; both are compared tensor by tensor."""
    bundle = DATA / "qwen3_moe-tiny-kt-bundle"
    code = "import runpy; runpy.run_module('kt_kernel.sft.convert_kt_to_sglang_adapter', run_name='__main__')"
    words = [
        "--base-model-name-or-path",
        "base",
        "--expert-output-dir",
        tmp_path / "experts",
        bundle,
        tmp_path / "merged",
    ]
    result = child(code, *words)
    assert result.returncode == 0, result.stderr
    for theirs, format in (("experts", "sglang"), ("merged", "sglang-merged")):
        convert_peft_to_kt_format(bundle, tmp_path / format, format=format)
        found, wanted = (load_file(tmp_path / name / "adapter_model.safetensors") for name in (format, theirs))
        short = {n.removeprefix("base_model.model."): t for n, t in found.items()}
        assert short.keys() == {n.removeprefix("base_model.model.") for n in wanted}
        for name, tensor in wanted.items():
            assert torch.equal(short[name.removeprefix("base_model.model.")], tensor), name
        configs = [json.loads((tmp_path / name / "adapter_config.json").read_text()) for name in (format, theirs)]
        assert all(configs[0][key] == configs[1][key] for key in ("r", "lora_alpha"))
        assert set(configs[0]["target_modules"]) == set(configs[1]["target_modules"])


def test_adapter_without_experts_is_skipped(tmp_path, model, kt_log):
    source = make_adapter(tmp_path / "source", model, skip_layers=(0, 1, 2))
    result = convert_peft_to_kt_format(source, tmp_path / "moe_lora.pt")
    assert result["status"] == "skipped" and result["total_keys"] == 0
    assert "No MoE expert LoRA keys found" in kt_log.text and not (tmp_path / "moe_lora.pt").exists()


def test_where_alpha_comes_from(tmp_path, adapter, kt_log):
    file = adapter / "adapter_model.safetensors"
    output = tmp_path / "o.pt"
    assert convert_peft_to_kt_format(file, output)["lora_alpha"] == 12.0  # the config beside it
    assert convert_peft_to_kt_format(file, output, lora_alpha=16)["lora_alpha"] == 12.0
    assert "lora_alpha 12 from" in kt_log.text and "not 16 from the command line" in kt_log.text
    (adapter / "adapter_config.json").unlink()
    assert convert_peft_to_kt_format(file, output, lora_alpha=16)["lora_alpha"] == 16.0
    assert convert_peft_to_kt_format(file, output)["lora_alpha"] == 32.0
    assert "lora_alpha 32 is taken from the default" in kt_log.text


def mismatch(tensors):
    name = next(n for n in tensors if ".experts.3.up_proj.lora_A" in n)
    return {**tensors, name: torch.ones(4, 63)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (mismatch, "Shape mismatch in layer 1: its experts' LoRA was made for hidden_size 63 and 64"),
        (lambda t: {n: v * float("inf") if ".experts.0.down" in n else v for n, v in t.items()}, "holds NaN or Inf"),
        (None, "cannot be read as safetensors"),
    ],
)
def test_errors_leave_no_output(tmp_path, adapter, change, message):
    if change is None:
        (adapter / "adapter_model.safetensors").write_bytes(b"not a tensor file")
    else:
        edit_adapter(adapter, change)
    for output, format in (("o.pt", None), ("o.safetensors", None), ("o", "sglang")):
        with pytest.raises(KTAdapterError) as error:
            convert_peft_to_kt_format(adapter, tmp_path / output, format=format)
        assert message in str(error.value)
    assert [p.name for p in tmp_path.iterdir()] == ["adapter"]


def test_outputs_that_do_not_go_together(tmp_path, adapter):
    with pytest.raises(KTConfigError, match="--format must be one of peft, kt-bundle, sglang, sglang-merged"):
        convert_peft_to_kt_format(adapter, tmp_path / "directory")
    with pytest.raises(KTConfigError, match="is a file's name"):
        convert_peft_to_kt_format(adapter, tmp_path / "o.pt", format="peft")
    for path in (adapter, tmp_path / "some.pt"):
        with pytest.raises(KTConfigError, match="--config goes with a tensor file"):
            convert_peft_to_kt_format(path, tmp_path / "o.pt", config_path=adapter / "adapter_config.json")
    with pytest.raises(KTPathError, match="does not exist"):
        convert_peft_to_kt_format(tmp_path / "none.safetensors", tmp_path / "o.pt")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "precious").write_text("")
    with pytest.raises(KTAdapterError, match="exists and is not empty"):
        convert_peft_to_kt_format(adapter, tmp_path / "full", format="peft")
    with pytest.raises(KTAdapterError, match=r"full is not empty and holds no adapter_config\.json"):
        convert_peft_to_kt_format(adapter, tmp_path / "full", format="peft", overwrite=True)
    with pytest.raises(KTAdapterError, match=r"is or contains .*adapter, which is read"):
        convert_peft_to_kt_format(adapter, adapter, format="peft", overwrite=True)
    for layout in ("peft", "kt-bundle"):
        convert_peft_to_kt_format(adapter, tmp_path / "again", format=layout, overwrite=True)
    assert (tmp_path / "again" / "kt_adapter_manifest.json").is_file() and (tmp_path / "full" / "precious").is_file()


def test_one_target_parameter_needs_a_model(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    tensors = load_file(DATA / "qwen3_moe-tiny-target-parameters" / "adapter_model.safetensors")
    from safetensors.torch import save_file

    save_file({n: t for n, t in tensors.items() if "base_layer" in n}, source / "adapter_model.safetensors")
    write_config(source, "base", r=8, lora_alpha=16, target_parameters=["mlp.experts.gate_up_proj"])
    with pytest.raises(KTAdapterError, match="a model is needed to read it"):
        convert_peft_to_kt_format(source, tmp_path / "o.pt")


@pytest.mark.parametrize(
    "command",
    [(KT, "convert"), ("import runpy; runpy.run_module('llamafactory_kt.convert_moe_lora', run_name='__main__')",)],
)
def test_command_line(tmp_path, adapter, command):
    output = tmp_path / "out" / "moe_lora.pt"
    words = [
        "--input",
        adapter / "adapter_model.safetensors",
        "--config",
        adapter / "adapter_config.json",
        "--output",
        output,
    ]
    result = child(*command, *words, "--verbose")
    assert result.returncode == 0 and "'status': 'success'" in result.stderr and output.is_file(), result.stderr
    (adapter / "adapter_model.safetensors").write_bytes(b"broken")
    result = child(*command, *words)
    assert (
        result.returncode == 1
        and result.stderr.splitlines()[-1].startswith("Error: ")
        and "Traceback" not in result.stderr
    )
    replaces = command[0] != KT  # SGLang's converter always did; the command wants --overwrite
    assert ("moe_lora.pt exists; choose another output" in result.stderr) is not replaces
    assert json.loads((adapter / "adapter_config.json").read_text())
