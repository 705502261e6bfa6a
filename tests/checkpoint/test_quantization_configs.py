"""What ``config.json`` and ``hf_quant_config.json`` say about a checkpoint: as published checkpoints say it, and as files that are
wrong do. Whatever stands there, a weight gets the right numbers, or the load ends in a :class:`KTModelError`."""

from __future__ import annotations

import copy
import itertools
import json
from types import SimpleNamespace

import pytest
import torch
from helpers.packed import awq, compressed, gptq, mxfp4, nvfp4
from helpers.places import DATA
from helpers.published import AUTO_ROUND, PUBLISHED
from safetensors.torch import load_file

from llamafactory_kt import KTModelError
from llamafactory_kt.checkpoint.formats import Format, format_of, quantization
from llamafactory_kt.checkpoint.stored import StoredTensor
from llamafactory_kt.ground.tensors.stores import DTYPES

OUT, IN = 64, 96
WRONG = (None, "other", "3", 3, -5, 0, 1.5, True, [], [4], ["x"], [[]], {}, {"x": 1}, {"x": {"bits": 3}})


def opened(values) -> Format:
    return format_of(SimpleNamespace(quantization_config=values))


def fp8(values):
    """As in DeepSeek's blocks, or with one scale for the whole weight."""
    torch.manual_seed(0)
    codes, ending = torch.randn(OUT, IN).to(torch.float8_e4m3fn), "_inv" if "weight_block_size" in values else ""
    scale = torch.rand(2, 2) + 0.5 if ending else torch.rand(()) + 0.5
    wide = scale.repeat_interleave(32, 0).repeat_interleave(48, 1) if ending else scale
    return {"weight": codes, f"weight_scale{ending}": scale}, codes.float() * wide


def packed(values):
    """A weight as such a checkpoint stores it, and its numbers."""
    torch.manual_seed(0)
    method, weight = values["quant_method"], torch.randn(OUT, IN)
    if values.get("quant_algo") == "NVFP4":
        return nvfp4(("weight", "weight_scale", "weight_scale_2"))(weight)
    if values.get("format") == "nvfp4-pack-quantized":
        return nvfp4()(weight)
    if method in ("fp8", "modelopt"):
        return fp8(values)
    if method == "compressed-tensors":
        [group] = values["config_groups"].values()
        stored, rounded = compressed({**group, "format": values["format"]}, torch.float32)(weight)
        return stored | {"input_scale": torch.ones(1)}, rounded
    if method == "mxfp4":
        blocks, scales, rounded = mxfp4(weight)
        return {"weight_blocks": blocks, "weight_scales": scales}, rounded
    if "awq" in (method, values.get("packing_format", "").rpartition("_")[2]):
        return awq(32)(weight)
    return gptq(32, ordered=method == "gptq")(weight)


def outcome(values, stored, wanted) -> str:
    """``right``, ``refused`` or ``plain``; fails if it is none."""
    try:
        form = opened(values)
    except KTModelError as error:
        assert "config.json" in str(error) and "\n" not in str(error)
        return "refused"
    if not form.parts:
        return "plain"  # a weight in float8 or without a tensor of its own name is refused then
    return "refused" if problems(form, stored, wanted) else "right"


def problems(form, stored, wanted, module: str = "model.layers.0.self_attn.q_proj") -> list[str]:
    """What is wrong with a stored weight. If nothing is, its numbers must be right."""
    transposed = form.title == "MXFP4"
    name = f"{module}.weight"
    split = {ending: form.split(f"{module}.{ending}") for ending in stored}
    parts = {part: stored[ending] for ending, (weight, part) in split.items() if weight == name}
    tensors = {
        part: StoredTensor(form.stored_name(name, part), DATA, tuple(t.shape), DTYPES[t.dtype])
        for part, t in parts.items()
    }
    shape = (IN, OUT) if transposed else (OUT, IN)
    found = list(form.problems(name, tensors, shape)) or [f"{part} {text}" for part, text in form.wrong_values(parts)]
    if not found:
        numbers = form.decode(parts, shape)
        assert torch.equal(numbers.T if transposed else numbers, wanted)
    return found


@pytest.mark.parametrize("model", PUBLISHED)
def test_published_configurations(model):
    assert outcome(PUBLISHED[model], *packed(PUBLISHED[model])) == "right"


def places(values, path=()):
    """The path of every key."""
    for key in values:
        yield (*path, key)
        if isinstance(values[key], dict):
            yield from places(values[key], (*path, key))


@pytest.mark.parametrize("model", PUBLISHED)
def test_no_value_of_another_type_leads_to_wrong_numbers_or_another_error(model):
    stored, wanted = packed(PUBLISHED[model])
    found = set()
    for (*path, key), wrong in itertools.product(places(PUBLISHED[model]), WRONG):
        values = copy.deepcopy(PUBLISHED[model])
        inner = values
        for step in path:
            inner = inner[step]
        inner[key] = wrong
        found.add(outcome(values, stored, wanted))
        del inner[key]
        found.add(outcome(values, stored, wanted))
    assert {"right", "refused"} <= found <= {"right", "refused", "plain"}


def test_scales_that_are_powers_of_two_in_eight_bits():
    """``scale_fmt: ue8m0``: DeepSeek-V3.1 stores such scales in float32, others as what they are."""
    values = PUBLISHED["DeepSeek-V3.1"]
    stored, _ = packed(values)
    scale = torch.tensor([[0.5, 2.0], [2.0**-20, 8.0]])
    wanted = stored["weight"].float() * scale.repeat_interleave(32, 0).repeat_interleave(48, 1)
    for dtype in (torch.float32, torch.bfloat16, torch.float8_e8m0fnu):
        assert not problems(opened(values), stored | {"weight_scale_inv": scale.to(dtype)}, wanted)
    found = problems(opened(values), stored | {"weight_scale_inv": scale.to(torch.uint8)}, wanted)
    assert "weight_scale_inv is U8 (2, 2), wanted F32" in found[0]


def test_fp8_attention_and_int4_experts():
    """As MiniMax-M2.1-FP8-INT4-AWQ, where each group has a format and its modules' names."""
    fp8, int4 = PUBLISHED["Qwen3-30B-A3B-FP8-block"], PUBLISHED["Kimi-K2-Thinking"]
    groups = {
        name: {**values["config_groups"]["group_0"], "format": values["format"], "targets": [target]}
        for name, values, target in (("a", int4, "re:.*experts.*w[123]$"), ("b", fp8, "re:.*self_attn.(q|k|v|o)_proj$"))
    }
    form = opened(int4 | {"format": "mixed-precision", "config_groups": groups})
    assert not problems(form, *packed(fp8))
    stored, wanted = packed(int4)
    assert problems(form, stored, wanted), "this module's weight is said to be FP8"
    assert not problems(form, stored, wanted, "model.layers.0.block_sparse_moe.experts.3.w2")


@pytest.mark.parametrize("bits", [4, 8])
def test_gptq_with_more_bits_for_some_layers(bits):
    """The tensors say how many a layer has. ``gptqmodel.safetensors`` is what test_formats.py says."""
    prefix = f"gptq.{bits}.desc_act."
    tables = load_file(DATA / "gptqmodel.safetensors").items()
    stored = {name.removeprefix(prefix): tensor for name, tensor in tables if name.startswith(prefix)}
    wanted, _ = stored.pop("weight"), stored.pop("qzeros_v2")
    form = opened(PUBLISHED["GPTQ-Int4-Int8Mix"])
    parts = {form.split(f"q_proj.{name}")[1]: tensor for name, tensor in stored.items()}
    assert torch.equal(form.decode(parts, tuple(wanted.shape)).half(), wanted)
    tensors = {part: StoredTensor(part, DATA, tuple(t.shape), DTYPES[t.dtype]) for part, t in parts.items()}
    assert not list(form.problems("q_proj.weight", tensors, tuple(wanted.shape)))
    assert form.label(tensors) == f"GPTQ INT{bits}"


def test_a_text_model_that_says_it_for_the_whole():
    """As Kimi-K2.5."""
    text = SimpleNamespace(quantization_config=PUBLISHED["Kimi-K2-Thinking"])
    assert format_of(SimpleNamespace(get_text_config=lambda: text)).title == "compressed-tensors"


def damaged(tensor):
    """Other sizes and dtypes than a tensor has."""
    for dim in range(tensor.dim()):
        yield tensor.narrow(dim, 0, tensor.shape[dim] // 2)
        yield torch.cat((tensor, tensor), dim)
    yield tensor[None] if tensor.dim() else tensor.expand(3)
    yield from (tensor.to(dtype) for dtype in (torch.float64, torch.int16, torch.bool))


@pytest.mark.parametrize("model", PUBLISHED)
def test_no_tensor_of_another_shape_or_dtype_leads_to_wrong_numbers(model):
    stored, wanted = packed(PUBLISHED[model])
    form = opened(PUBLISHED[model])
    for name in stored.keys() - {"input_scale"}:
        rest = {other: tensor for other, tensor in stored.items() if other != name}
        assert problems(form, rest, wanted) or name in ("weight_shape", "weight_zero_point"), f"without {name}"
        for tensor in damaged(stored[name]):
            assert problems(form, rest | {name: tensor}, wanted), (name, tensor.shape, tensor.dtype)


@pytest.mark.parametrize("model", ["Qwen3-30B-A3B-GPTQ-Int4", "w4a16, asymmetric, ordered by activations"])
def test_columns_of_groups_that_do_not_exist(model):
    stored, wanted = packed(PUBLISHED[model])
    form, [name] = opened(PUBLISHED[model]), [name for name in stored if name.endswith("g_idx")]
    for column, group in ((5, 3), (0, -2), (95, 1000)):
        stored[name][column] = group
        assert "names groups" in problems(form, stored, wanted)[0]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ("fp8", r'^config.json: quantization_config is "fp8", wanted an object'),
        (["fp8"], r'quantization_config is \["fp8"\], wanted an object'),
        (
            {"quant_method": "gptq", "bits": [4]},
            r"^config.json: quantization_config.bits is \[4\], wanted an integer. Restore",
        ),
        ({"quant_method": "gptq", "bits": 4, "group_size": -5}, "group_size is -5, wanted -1 or a positive integer"),
        (
            {"quant_method": "gptq", "bits": 4, "dynamic": ["x"]},
            r'quantization_config.dynamic is \["x"\], wanted an object',
        ),
        (
            {"quant_method": "modelopt", "quantization": "FP8"},
            r'quantization_config.quantization is "FP8", wanted an object',
        ),
        (
            {"quant_method": "fp8", "weight_block_size": 128},
            r"weight_block_size is 128, wanted two sizes such as \[128, 128\]",
        ),
        ({"quant_method": "awq", "bits": 4, "zero_point": "yes"}, 'zero_point is "yes", wanted true or false'),
        ({"quant_method": "compressed-tensors", "format": "pack-quantized"}, "has no config_groups in config.json"),
        ({"quant_method": ["awq"]}, r'quant_method is \["awq"\], wanted a string'),
        (
            {**PUBLISHED["Kimi-K2-Thinking"], "transform_config": {"config_groups": {}}},
            "asks for rotations of the activations",
        ),
        ({**AUTO_ROUND, "spinquant_config": {"r1": True}}, "spinquant_config asks for rotations"),
        (
            {**AUTO_ROUND, "packing_format": "auto_round:exllamav2"},
            "packing_format: auto_round:exllamav2, bits: 4 in config.json",
        ),
        ({**AUTO_ROUND, "packing_format": "auto_round:fp8_static"}, "packing_format: auto_round:fp8_static"),
        ({**AUTO_ROUND, "bits": 2}, "bits: 2 in config.json"),
        ({**AUTO_ROUND, "act_bits": 8}, "cannot be read for: .'auto_round:auto_gptq'"),
        ({**AUTO_ROUND, "extra_config": {"lm_head": {"bits": 4, "group_size": 64}}}, "cannot be read for: .'lm_head'"),
        ({**AUTO_ROUND, "extra_config": {"lm_head": {"bits": 3}}}, "cannot be read for: .'lm_head'"),
    ],
)
def test_what_is_said(values, message):
    with pytest.raises(KTModelError, match=message):
        opened(values)


def test_nested_values_are_named_by_their_path():
    values = copy.deepcopy(PUBLISHED["Kimi-K2-Thinking"])
    values["config_groups"]["group_0"]["targets"] = ["re:.*(experts"]
    config = SimpleNamespace(quantization_config=values, name_or_path="models/kimi")
    with pytest.raises(
        KTModelError, match=r"^config.json of models/kimi: quantization_config.config_groups.group_0.targets is .re:"
    ):
        format_of(config)


@pytest.mark.parametrize("values", [None, {}])
def test_nothing_is_said(values):
    assert type(opened(values)) is Format and quantization(SimpleNamespace(quantization_config=values)) == {}


def test_compression_config_of_older_versions():
    config = SimpleNamespace(compression_config=PUBLISHED["Qwen3-30B-A3B-quantized.w8a8"])
    assert format_of(config).title == "compressed-tensors"


def modelopt(tmp_path, quant, **producer):
    (tmp_path / "hf_quant_config.json").write_text(
        json.dumps({"producer": {"name": "modelopt"} | producer, "quantization": quant})
    )
    return SimpleNamespace(name_or_path=str(tmp_path))


def test_modelopts_file_beside_a_configuration_that_says_nothing(tmp_path):
    config = modelopt(tmp_path, {"quant_algo": "FP8", "kv_cache_quant_algo": "FP8", "exclude_modules": ["lm_head"]})
    assert format_of(config).title == "FP8" and quantization(config)["quant_method"] == "modelopt"
    assert type(format_of(modelopt(tmp_path, {"quant_algo": None, "kv_cache_quant_algo": "FP8"}))) is Format
    for quant, more, message in (
        ({"quant_algo": "W4A8_AWQ"}, {}, "quant_algo: W4A8_AWQ in hf_quant_config.json of "),
        (
            {"quant_algo": ["FP8"]},
            {},
            r'^hf_quant_config.json of .*: quantization.quant_algo is \["FP8"\], wanted a string',
        ),
        ("FP8", {}, 'the file.quantization is "FP8", wanted an object'),
        ({}, {"name": "other"}, "hf_quant_config.json of .*: The checkpoint was quantized by other"),
    ):
        with pytest.raises(KTModelError, match=message):
            format_of(modelopt(tmp_path, quant, **more))
    (tmp_path / "hf_quant_config.json").write_text("{")
    with pytest.raises(KTModelError, match=r"hf_quant_config.json cannot be read as JSON"):
        format_of(config)


AUTO_ROUND_TABLES = [
    *((f"{kind}.{bits}.{sym}", bits, packing)
      for kind, packing in (("auto_gptq", "auto_round:auto_gptq"), ("plain", "auto_round"), ("plain", "auto_round:gptqmodel"))
      for bits in (4, 8) for sym in ("sym", "asym")),
    ("awq.4.asym", 4, "auto_round:auto_awq"),
]  # fmt: skip


@pytest.mark.parametrize(("table", "bits", "packing"), AUTO_ROUND_TABLES)
def test_auto_round_as_it_computes(table, bits, packing):
    """``auto-round.safetensors`` holds what AutoRound 0.15 (b9f3d0079) packed on 2026-11-28 of random integers: ``QuantLinear.pack`` of
    ``qlinear_torch_zp.py`` and ``qlinear_torch.py``, and ``WQLinear_GEMM.from_linear``; ``weight`` is what their layers then computed of
    the identity matrix, transposed, in float16."""
    stored = {
        n.rpartition(".")[2]: t
        for n, t in load_file(DATA / "auto-round.safetensors").items()
        if n.startswith(f"{table}.")
    }
    wanted = stored.pop("weight")
    form = opened(AUTO_ROUND | {"bits": bits, "packing_format": packing, "sym": table.endswith(".sym")})
    parts = {form.split(f"q_proj.{name}")[1]: tensor for name, tensor in stored.items()}
    assert torch.equal(form.decode(parts, tuple(wanted.shape)).half(), wanted)
