"""What ``config.json`` and ``hf_quant_config.json`` say about a checkpoint: as published checkpoints say it, and as files that are
wrong do. Whatever stands there, a weight gets the right numbers, or the load ends in a :class:`KTModelError`."""

from __future__ import annotations

import copy
import itertools
import json
from types import SimpleNamespace

import pytest
import torch
from helpers.packed import awq, compressed, gptq, mxfp4
from helpers.places import DATA
from helpers.published import AUTO_ROUND, PUBLISHED
from safetensors.torch import load_file

from llamafactory_kt import KTModelError
from llamafactory_kt.checkpoint.formats import Format, format_of, quantization
from llamafactory_kt.checkpoint.stored import StoredTensor
from llamafactory_kt.ground.tensor_files import DTYPES

OUT, IN = 64, 96
WEIGHT = "model.layers.0.self_attn.q_proj.weight"
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
    return gptq(32)(weight)


def outcome(values, stored, wanted) -> str:
    """``right``, ``refused`` or ``plain``; fails if it is none."""
    try:
        form = opened(values)
    except KTModelError as error:
        assert "config.json" in str(error) and "\n" not in str(error)
        return "refused"
    if not form.parts:
        return "plain"  # a weight in float8 or without a tensor of its own name is refused then
    transposed = form.title == "MXFP4"
    names = {name: form.split(f"{WEIGHT.removesuffix('weight')}{name}") for name in stored}
    parts = {part: stored[name] for name, (weight, part) in names.items() if weight == WEIGHT}
    tensors = {
        part: StoredTensor(form.stored_name(WEIGHT, part), DATA, tuple(t.shape), DTYPES[t.dtype])
        for part, t in parts.items()
    }
    shape = (IN, OUT) if transposed else (OUT, IN)
    if list(form.problems(WEIGHT, tensors, shape)) or list(form.wrong_values(parts)):
        return "refused"
    found = form.decode(parts, shape)
    assert torch.equal(found.T if transposed else found, wanted)
    return "right"


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
        KTModelError, match=r"^models/kimi/config.json: quantization_config.config_groups.group_0.targets is .re:"
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
        ({"quant_algo": "NVFP4"}, {}, "quant_algo: NVFP4 in .*hf_quant_config.json"),
        ({"quant_algo": ["FP8"]}, {}, r'hf_quant_config.json: quantization.quant_algo is \["FP8"\], wanted a string'),
        ("FP8", {}, 'the file.quantization is "FP8", wanted an object'),
        ({}, {"name": "other"}, "hf_quant_config.json: The checkpoint was quantized by other"),
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
