"""Whole checkpoints in each format, experts and attention quantized, compared with stock transformers on what they stand for."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from helpers.adapters import make_adapter
from helpers.architectures import tiny_model
from helpers.fp8 import make_fp8, quantized
from helpers.loading import answer, load
from helpers.marks import needs_native
from helpers.models import make_model
from helpers.packed import awq, compressed, gptq, mxfp4, nvfp4, quantized_checkpoint, save_both, split_experts
from helpers.references import merged_float32, per_token, rel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Mxfp4Config

from llamafactory_kt import KTModelError, apply_adapter
from llamafactory_kt.checkpoint.opening import open_checkpoint
from llamafactory_kt.ground import internals
from llamafactory_kt.model.state import kt_state
from llamafactory_kt.native.packed import PackedWeight
from llamafactory_kt.tools.merge import merge_adapter


def scheme(form, strategy, kind="int", bits=4, **more):
    weights = {"num_bits": bits, "type": kind, "strategy": strategy, "symmetric": True, **more}
    return {"format": form, "targets": ["Linear"], "weights": weights}


def compressed_tensors(group, **more):
    return {
        "quant_method": "compressed-tensors",
        "format": group["format"],
        "config_groups": {"group_0": group},
        **more,
    }


def not_attention(name):
    return quantized(name) and ".self_attn." not in name


KIMI = scheme("pack-quantized", "group", group_size=32)
ROWS = scheme("float-quantized", "channel", "float", 8)
CASES = {
    # as Kimi-K2-Thinking: attention is left out
    "INT4": ("deepseek_v3", lambda: compressed(KIMI, torch.float32), compressed_tensors(KIMI, ignore=["re:.*self_attn.*"]), not_attention),
    "F8_E4M3": ("glm4_moe", lambda: compressed(ROWS, torch.float32), compressed_tensors(ROWS), quantized),
    "GPTQ INT4": (
        "qwen3_moe", lambda: gptq(32), {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": True, "sym": False}, quantized,
    ),
    "GPTQ INT4, in order": (
        "qwen3_moe", lambda: gptq(32, ordered=False), {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False}, quantized,
    ),
    "NVFP4": (
        "deepseek_v2", lambda: nvfp4(("weight", "weight_scale", "weight_scale_2")),
        {"quant_method": "modelopt", "quant_algo": "NVFP4"}, quantized,
    ),
    "AWQ INT4": ("mixtral", lambda: awq(32), {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm"}, quantized),
}  # fmt: skip


@pytest.fixture(scope="module", params=CASES)
def files(request, tmp_path_factory):
    """The quantized checkpoint, what it stands for, an adapter, and what the experts are stored as."""
    root = tmp_path_factory.mktemp("quantized")
    architecture, packer, quantization, wanted = CASES[request.param]
    source = make_model(root / "source", architecture, dtype=torch.float32, hidden_size=64)
    packed, plain = quantized_checkpoint(root, source, packer(), quantization, wanted)
    naming = "mixtral" if architecture == "mixtral" else "B"
    return packed, plain, make_adapter(root / "adapter", plain, rank=5, naming=naming), request.param


def test_every_number_is_the_formats(files):
    """Experts as they are read, and everything else as transformers loads it."""
    packed, plain, _, label = files
    wanted, found = open_checkpoint(plain).layout, open_checkpoint(packed, quantized=True).layout
    assert found.dtypes() == {label.partition(",")[0]}
    for module in found.modules:
        pairs = zip(
            found.layer(module.name).experts(torch.float32),
            wanted.layer(module.name).experts(torch.float32),
            strict=True,
        )
        assert all(torch.equal(a, b) for mine, other in pairs for a, b in zip(mine, other, strict=True))
    weights = dict(load(packed, "torch", dtype=torch.float32).named_parameters())
    stock = {n: p for n, p in merged_float32(plain, None).named_parameters() if ".experts." not in n}
    assert weights.keys() == stock.keys() and all(torch.equal(weights[name], stock[name]) for name in stock)


@pytest.mark.parametrize("backend", ["torch", pytest.param("native", marks=needs_native)])
def test_the_whole_adapter_on_top(files, backend):
    packed, plain, adapter, label = files
    model = load(packed, backend, dtype=torch.float32, adapter=str(adapter))
    base = answer(model)
    whole = answer(apply_adapter(model, adapter)[0])
    wanted = answer(merged_float32(plain, None)), answer(merged_float32(plain, adapter))
    # The experts are bfloat16 in memory, or what they are multiplied by.
    assert per_token(base, wanted[0]) < 0.01 and per_token(whole, wanted[1]) < 0.01
    assert rel(wanted[1], wanted[0]) > 0.3
    if backend == "native":
        assert kinds(model) == {AS_STORED.get(label)}


AS_STORED = {"INT4": "int4", "F8_E4M3": "e4m3", "GPTQ INT4, in order": "int4", "AWQ INT4": "int4"}
"""what the kernels multiply without decoding it"""


def kinds(model) -> set[str | None]:
    """The kinds of the packed weights that the engines hold, None for others; of each, the memory is what it takes."""
    engines = [experts.engine for experts in kt_state(model).wrappers]
    matrices = [[matrix for expert in engine._weights for matrix in expert] for engine in engines]
    for engine, own in zip(engines, matrices, strict=True):
        biases = sum(bias.nbytes for bias in engine._biases or ())
        assert engine.nbytes - biases == sum(matrix.nbytes for matrix in own)
        assert all(w.nbytes == w.packing.nbytes(*w.shape) for w in own if isinstance(w, PackedWeight))
    return {w.packing.kind if isinstance(w, PackedWeight) else None for own in matrices for w in own}


@pytest.mark.parametrize("files", ["GPTQ INT4"], indirect=True)
def test_chat_verify_and_doctor(files):
    """LLaMA-Factory would ask for GPTQModel, which is not installed."""
    chat = pytest.importorskip("llamafactory.chat")
    from typer.testing import CliRunner

    from llamafactory_kt.cli import app

    packed, plain, adapter, label = files
    keys = {
        "model_name_or_path": str(packed), "adapter_name_or_path": str(adapter), "template": "deepseek", "use_kt": True,
        "kt_backend": "torch",
    }  # fmt: skip
    model = chat.ChatModel(keys).engine.model
    assert per_token(answer(model).float(), answer(merged_float32(plain, adapter))) < 0.1
    config = packed.parent / "chat.yaml"
    config.write_text(json.dumps(keys))
    result = CliRunner().invoke(app, ["verify", str(config)])
    assert result.exit_code == 0 and "layers are right" in result.output, result.output
    result = CliRunner().invoke(app, ["doctor", str(config), "--json"])
    found = {finding["subject"]: finding for finding in json.loads(result.stdout)["findings"]}
    assert f"experts in {label}" in found["checkpoint"]["text"]
    with pytest.raises(KTModelError, match="is a quantized checkpoint"):
        merge_adapter(packed, adapter, packed.parent / "merged")


@needs_native
def test_gpt_oss_in_mxfp4(tmp_path):
    """As it is published: only the experts' weights are quantized, not their biases. transformers reads the same files."""
    tiny_model("gpt_oss", intermediate_size=96).save_pretrained(tmp_path / "source")
    packed, plain = {}, {}
    for name, weight in load_file(tmp_path / "source" / "model.safetensors").items():
        packed[name] = plain[name] = weight
        if name.endswith(("gate_up_proj", "down_proj")):
            del packed[name]
            packed[f"{name}_blocks"], packed[f"{name}_scales"], rounded = mxfp4(weight.transpose(1, 2))
            plain[name] = rounded.transpose(1, 2)
    quantization = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}
    packed, plain = save_both(tmp_path, tmp_path / "source", packed, plain, quantization)
    assert open_checkpoint(packed, quantized=True).layout.dtypes() == {"MXFP4"}
    found = answer(load(packed, "torch", dtype=torch.float32))
    native = load(packed, "native", dtype=torch.float32)
    assert per_token(answer(native), found) < 0.01 and kinds(native) == {"int4"}
    mapped = load(packed, "native", dtype=torch.float32, load="mmap")
    assert torch.equal(answer(mapped), answer(native)) and kinds(mapped) == {"int4"}
    stock = AutoModelForCausalLM.from_pretrained(
        packed, dtype=torch.float32, quantization_config=Mxfp4Config(dequantize=True)
    )
    for wanted in (answer(stock.float()), answer(AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32))):
        assert per_token(found, wanted) < 1e-5, "its numbers are bfloat16 ones"


def test_modelopt_which_transformers_does_not_know(tmp_path):
    """A chat passes the configuration on; in Python it is read from the file, or from ModelOpt's own."""

    def pack(weight):
        scale = weight.abs().max() / 448
        codes = (weight / scale).to(torch.float8_e4m3fn)
        return {"weight": codes, "weight_scale": scale, "input_scale": torch.tensor(0.1)}, codes.float() * scale

    quantization = {"quant_method": "modelopt", "quant_algo": "FP8"}
    source = make_model(tmp_path / "source", "qwen3_moe", dtype=torch.float32)
    packed, plain = quantized_checkpoint(tmp_path, source, pack, quantization, quantized)
    wanted = answer(merged_float32(plain, None))
    assert per_token(answer(load(packed, "torch", dtype=torch.float32)), wanted) < 0.01
    config = json.loads((packed / "config.json").read_text())
    del config["quantization_config"]
    (packed / "config.json").write_text(json.dumps(config))
    with pytest.raises(KTModelError, match="experts must be stored as F32, F16 or BF16, or quantized"):
        load(packed, "torch")
    own = {"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "FP8", "kv_cache_quant_algo": "FP8"}}
    (packed / "hf_quant_config.json").write_text(json.dumps(own))
    assert per_token(answer(load(packed, "torch", dtype=torch.float32)), wanted) < 0.01


@pytest.fixture(scope="module")
def fp8(tmp_path_factory):
    root = tmp_path_factory.mktemp("fp8")
    return make_fp8(root, make_model(root / "source", "deepseek_v3", dtype=torch.float32), [32, 48])[0]


def edited(directory, source, change):
    shutil.copytree(source, directory)
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


@pytest.mark.parametrize("files", ["GPTQ INT4"], indirect=True)
def test_damage_is_named_with_its_file(files, tmp_path):
    """What headers tell, and groups of columns that do not exist: those of attention before weights are read, as transformers would
    collect the error into its own, those of experts when they are read."""
    packed, expert, attention = files[0], "model.layers.1.mlp.experts.3.down_proj", "model.layers.0.self_attn.o_proj"

    def cut(tensors):
        tensors[f"{expert}.scales"] = tensors[f"{expert}.scales"][:1].contiguous()
        del tensors[f"{attention}.qzeros"]

    path = edited(tmp_path / "cut", packed, cut)
    file = str(path / "model.safetensors")
    with pytest.raises(
        KTModelError, match=r"2 tensors do not fit .*scales is F16 .*, wanted .*o_proj.qzeros is missing"
    ) as caught:
        open_checkpoint(path, quantized=True).layout  # noqa: B018
    assert str(caught.value).count(f"in {file}") == 2
    for module in (attention, expert):
        name = f"{module}.g_idx"
        path = edited(tmp_path / module, packed, lambda tensors, name=name: tensors[name].add_(1))
        if module == attention:
            with pytest.raises(KTModelError, match=f"model.safetensors: {name} names groups 1 to"):
                open_checkpoint(path, quantized=True).layout  # noqa: B018
        with pytest.raises(KTModelError, match=f"model.safetensors: {name} names groups 1 to"):
            load(path, "torch")


@needs_native
@pytest.mark.parametrize("files", ["INT4"], indirect=True)
def test_scales_of_experts_that_are_not_finite(files, tmp_path):
    name = "model.layers.1.mlp.experts.3.down_proj"
    path = edited(tmp_path / "m", files[0], lambda tensors: tensors[f"{name}.weight_scale"][5].fill_(torch.nan))
    with pytest.raises(KTModelError, match=rf"model.safetensors: {name}.weight has scales that are not finite"):
        load(path, "native")


@needs_native
@pytest.mark.parametrize("files", ["GPTQ INT4"], indirect=True)
def test_ordered_columns_that_the_configuration_does_not_mention(files, tmp_path):
    """They are found while reading, and decoded."""
    path = edited(tmp_path / "m", files[0], lambda tensors: None)
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"]["desc_act"] = False
    (path / "config.json").write_text(json.dumps(config))
    found = load(path, "native", dtype=torch.float32)
    assert kinds(found) == {None} and torch.equal(answer(found), answer(load(files[0], "native", dtype=torch.float32)))


EXPERT, ATTENTION = "model.layers.1.mlp.experts.3.down_proj", "model.layers.0.self_attn.o_proj"


@pytest.mark.parametrize("module", [EXPERT, ATTENTION])
@pytest.mark.parametrize("ending", ["weight_scale", "weight_zero_point", "qzeros", "g_idx", "weight.absmax", "bias"])
def test_what_belongs_to_a_weight_and_is_not_read_stops_the_load(fp8, tmp_path, module, ending):
    path = edited(tmp_path / "m", fp8, lambda tensors: tensors.update({f"{module}.{ending}": torch.ones(3)}))
    with pytest.raises(KTModelError, match=rf"^1 tensors of the checkpoint belong to weights .*: {module}.{ending}\."):
        load(path, "torch")


def test_what_belongs_to_nothing_that_is_loaded_does_not(fp8, tmp_path):
    """A bias of zeros, scales of activations, and the layer for multi-token prediction, which transformers leaves out."""

    def change(tensors):
        tensors[f"{ATTENTION}.bias"] = torch.zeros(64)
        tensors[f"{ATTENTION}.activation_scale"] = torch.ones(1)
        tensors["model.layers.61.mlp.experts.3.down_proj.weight_scale_inv"] = torch.ones(3)
        tensors["model.layers.3.mlp.experts.3.down_proj.weight_scale_inv"] = torch.ones(3)

    path = edited(tmp_path / "m", fp8, change)
    assert torch.equal(answer(load(path, "torch")), answer(load(fp8, "torch")))


def test_scales_without_a_quantization_config(fp8, tmp_path):
    path = edited(tmp_path / "m", fp8, lambda tensors: tensors.update({n: t.float() for n, t in tensors.items()}))
    config = json.loads((path / "config.json").read_text())
    del config["quantization_config"]
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(KTModelError, match=r"belong to weights .* taken for unquantized"):
        load(path, "torch")


def test_scales_of_activations_and_caches_are_nothing_to_any_format(tmp_path):
    path, plain = quantized_checkpoint(
        tmp_path, make_model(tmp_path / "source", "mixtral", dtype=torch.float32), awq(32),
        {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm", "zero_point": True}, quantized,
    )  # fmt: skip

    def change(tensors):
        for name in (
            "self_attn.k_scale",
            "self_attn.kv_scale",
            "self_attn.v_proj.output_scale",
            "self_attn.o_proj.input_scale",
        ):
            tensors[f"model.layers.0.{name}"] = torch.ones(1)

    for number, source in enumerate((path, plain)):
        load(edited(tmp_path / str(number), source, change), "torch")


@pytest.mark.parametrize("architecture", ["qwen3_5_moe_text", "llama4_text"])
def test_fused_experts_that_the_quantizer_has_split(tmp_path, architecture, monkeypatch):
    """As the FP8 files of Qwen3.5 and Qwen3-VL: transformers has no rule for a tensor of one expert there."""
    model = tiny_model(architecture)
    model.save_pretrained(tmp_path / "source")
    split_experts(tmp_path / "source", transposed=architecture == "llama4_text")
    packed, dequantized = make_fp8(tmp_path, tmp_path / "source", [32, 48])
    plain = load_file(dequantized / "model.safetensors")
    for name, parameter in model.named_parameters():
        if name.endswith("experts.gate_up_proj"):
            block = name.removesuffix(".gate_up_proj")
            for number in range(len(parameter)):
                gate, up, down = (plain.pop(f"{block}.{number}.{p}_proj.weight") for p in ("gate", "up", "down"))
                both = torch.cat((gate, up))
                turned = architecture == "llama4_text"
                parameter.data[number] = both.T if turned else both
                model.get_parameter(f"{block}.down_proj").data[number] = down.T if turned else down
    missing, unexpected = model.load_state_dict(plain, strict=False)
    assert not unexpected and all(".experts." in name for name in missing)
    assert per_token(answer(load(packed, "torch", dtype=torch.float32)), answer(model)) < 0.01
    monkeypatch.setitem(internals.TESTED, "transformers", "<5")
    load(packed, "torch", dtype=torch.float32)
