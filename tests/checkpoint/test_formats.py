"""Each format's numbers, compared bit for bit with the format's own library, and what is said about checkpoints that do not fit."""

from __future__ import annotations

import itertools
from math import prod
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers.packed import awq, compressed, gptq, mxfp4, nvfp4
from helpers.places import DATA
from safetensors.torch import load_file

from llamafactory_kt import KTModelError
from llamafactory_kt.checkpoint.formats import FORMATS, WHOLE, Format, format_of
from llamafactory_kt.checkpoint.formats import format as formats
from llamafactory_kt.checkpoint.formats.fp8 import widened
from llamafactory_kt.checkpoint.formats.mxfp4 import e2m1, powers_of_two
from llamafactory_kt.checkpoint.stored import StoredTensor
from llamafactory_kt.checkpoint.stored_weight import StoredWeight
from llamafactory_kt.ground.tensors.stores import DTYPES

OUT, IN = 64, 96


@pytest.fixture(autouse=True)
def few_rows_at_a_time(monkeypatch):
    """So that weights are decoded in several pieces, the last of them smaller."""
    monkeypatch.setattr(formats, "_AT_A_TIME", 24 * IN)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)


def opened(**quantization) -> Format:
    return format_of(SimpleNamespace(quantization_config=quantization))


def parts_of(form: Format, stored: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    split = {name: form.split(f"model.q_proj.{name}") for name in stored}
    assert {weight for weight, _ in split.values()} == {"model.q_proj.weight"}
    return {part: stored[name] for name, (_, part) in split.items()}


def headers(form: Format, parts: dict[str, torch.Tensor], weight: str = "model.q_proj.weight"):
    return {
        part: StoredTensor(form.stored_name(weight, part), Path("f"), tuple(t.shape), DTYPES[t.dtype])
        for part, t in parts.items()
    }


def check(form: Format, stored: dict[str, torch.Tensor], wanted: torch.Tensor) -> None:
    """Headers are accepted, and the numbers are the wanted ones."""
    parts = parts_of(form, stored)
    assert list(form.problems("model.q_proj.weight", headers(form, parts), (OUT, IN))) == []
    assert form.is_quantized(headers(form, parts))
    exact = form.decode(parts, (OUT, IN))
    assert exact.dtype == torch.float32 and torch.equal(exact.to(wanted.dtype), wanted)
    assert torch.equal(form.decode(parts, (OUT, IN), wanted.dtype), wanted), "rounded once"
    check_packed(form, parts, (OUT, IN))


def check_packed(form: Format, parts: dict[str, torch.Tensor], shape, name="model.q_proj.weight", experts=()) -> str:
    """What the native kernels get, if anything, are the numbers that are decoded. Returns its kind, with its group.

    Args:
        shape: of the weight, with ``experts`` before it in the headers.
    """
    stored = {part: t.expand((*experts, *t.shape)) for part, t in parts.items()}
    weight = StoredWeight(name, form, headers(form, stored, name), (*experts, *shape))
    packing = weight.packing
    if packing is None or not form.can_pack(parts, packing):
        return ""
    found, decoded = weight.packed(parts, packing), form.decode(parts, shape)
    assert found.shape == weight.rows and found.nbytes == packing.nbytes(*weight.rows)
    decoded = decoded.T if form.turned else decoded
    if found.offsets is not None and parts["scale"].dtype == torch.float32:  # these products are rounded
        torch.testing.assert_close(found.dequantize(), decoded, rtol=0, atol=1e-6)
    else:
        assert torch.equal(found.dequantize(), decoded)
    assert weight.in_place == prod(experts) * sum(
        tensor.nbytes for tensor in found.tensors if any(shares(tensor, part) for part in parts.values())
    )
    return f"{packing.kind} {min(packing.group, found.shape[1])}"


def shares(tensor: torch.Tensor, part: torch.Tensor) -> bool:
    return tensor.untyped_storage().data_ptr() == part.untyped_storage().data_ptr()


COMPRESSED = [
    *(("pack-quantized", "int", *rest) for rest in itertools.product((4, 8), ("group", "channel"), (True, False))),
    *(("int-quantized", "int", 8, *rest) for rest in itertools.product(("channel", "tensor"), (True, False))),
    *(("float-quantized", "float", 8, strategy, True) for strategy in ("channel", "tensor", "block")),
]


@pytest.mark.parametrize(("form", "kind", "bits", "strategy", "symmetric"), COMPRESSED)
def test_compressed_tensors_as_its_library_decompresses_them(form, kind, bits, strategy, symmetric):
    weights = {"num_bits": bits, "type": kind, "strategy": strategy, "symmetric": symmetric}
    weights |= {"group_size": 32} if strategy == "group" else {}
    weights |= {"block_structure": [16, 48]} if strategy == "block" else {}
    check_compressed(form, weights)


def test_nvfp4_as_compressed_tensors_decompresses_it():
    """It rounds to bfloat16."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme

    weights = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16, "symmetric": True}
    scheme = {"format": "nvfp4-pack-quantized", "targets": ["Linear"], "weights": weights}
    own = BaseCompressor.get_value_from_registry("nvfp4-pack-quantized")
    theirs = QuantizationScheme(targets=["Linear"], weights=weights)
    weight = torch.randn(OUT, IN)
    made, _ = nvfp4()(weight)
    state = {
        "weight": weight,
        "weight_scale": made["weight_scale"].float(),
        "weight_global_scale": made["weight_global_scale"],
    }
    with torch.compiler.set_stance("force_eager"):  # the library would compile its packing, for seconds
        stored = own.compress(state, theirs)
        wanted = own.decompress(dict(stored), theirs)["weight"]
    assert wanted.dtype == torch.bfloat16 and torch.equal(stored["weight_packed"], made["weight_packed"])
    check(opened(quant_method="compressed-tensors", config_groups={"group_0": scheme}), stored, wanted)


@pytest.mark.parametrize("symmetric", [True, False])
def test_compressed_tensors_with_activation_ordering(symmetric):
    weights = {
        "num_bits": 4, "type": "int", "strategy": "group", "group_size": 32, "symmetric": symmetric, "actorder": "group"
    }  # fmt: skip
    check_compressed("pack-quantized", weights)


def test_compressed_tensors_with_a_group_of_each_column_that_was_not_set():
    """Some versions of the library store -1 for weights that were not reordered, and take these as if it were not there."""
    weights = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32, "symmetric": True}
    check_compressed("pack-quantized", weights, weight_g_idx=torch.full((IN,), -1, dtype=torch.int32))


def test_compressed_tensors_with_zero_points_of_symmetric_weights():
    weights = {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": True}
    check_compressed("int-quantized", weights, weight_zero_point=torch.zeros(OUT, 1, dtype=torch.int8))


def test_compressed_tensors_without_quantized_weights():
    """A cache alone may be quantized."""
    assert type(opened(quant_method="compressed-tensors", config_groups={}, kv_cache_scheme={"num_bits": 8})) is Format


def test_autofp8():
    """``weight_scale`` of the whole weight; its configuration knows no blocks."""
    form = opened(quant_method="fp8", activation_scheme="static", ignored_layers=["lm_head"])
    codes, scale = torch.randn(OUT, IN).to(torch.float8_e4m3fn), torch.tensor([0.3])
    check(form, {"weight": codes, "weight_scale": scale}, codes.float() * scale)


def check_compressed(form, weights, **more):
    scheme = {"format": form, "targets": ["Linear"], "weights": weights}
    stored, wanted = compressed(scheme)(torch.randn(OUT, IN))
    found = opened(quant_method="compressed-tensors", format=form, config_groups={"group_0": scheme})
    check(found, stored | more, wanted.bfloat16())


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("kind", ["", ".desc_act", ".sym"])
@pytest.mark.parametrize("version", ["gptq", "gptq_v2"])
def test_gptq_as_gptqmodel_dequantizes_it(bits, kind, version):
    """``gptqmodel.safetensors`` holds what GPTQModel 7.7.0 made of random weights on 2026-11-28: ``PackableQuantLinear.pack_block`` packed
    them, ``dequantize_weight`` gave ``weight`` [in, out] in float16, transposed here; ``qzeros`` are ``qzeros_v2`` less one in each
    integer, as ``convert_gptq_v2_to_v1_format_module`` writes them. The same of its AWQ: ``pack_awq`` and ``dequantize_gemm``. GPTQModel
    needs a GPU to be installed, these functions do not."""
    prefix = f"gptq.{bits}{kind}."
    stored = {n.removeprefix(prefix): t for n, t in tables().items() if n.rpartition(".")[0] + "." == prefix}
    wanted, zeros = stored.pop("weight"), stored.pop("qzeros_v2")
    if version == "gptq_v2":
        stored["qzeros"] = zeros
    form = opened(
        quant_method="gptq",
        bits=bits,
        group_size=32,
        checkpoint_format=version,
        desc_act="desc_act" in kind,
        sym="sym" in kind,
    )
    parts = parts_of(form, stored)
    assert list(form.problems("model.q_proj.weight", headers(form, parts), tuple(wanted.shape))) == []
    assert torch.equal(form.decode(parts, tuple(wanted.shape)).half(), wanted)
    assert check_packed(form, parts, tuple(wanted.shape)) == ("" if "desc_act" in kind else f"int{bits} 32")
    if kind == "":  # without activation ordering, but not symmetric: as decoded, whatever the configuration says
        lying = opened(quant_method="gptq", bits=bits, group_size=32, checkpoint_format=version, sym=True)
        assert check_packed(lying, parts, tuple(wanted.shape)) == ""


def test_awq_as_gptqmodel_dequantizes_it():
    stored = {n.removeprefix("awq."): t for n, t in tables().items() if n.startswith("awq.")}
    wanted = stored.pop("weight")
    form = opened(quant_method="awq", bits=4, group_size=32, version="gemm", zero_point=True)
    parts = parts_of(form, stored)
    assert torch.equal(form.decode(parts, tuple(wanted.shape)).half(), wanted)
    assert check_packed(form, parts, tuple(wanted.shape)) == "int4 32"


def tables():
    return load_file(DATA / "gptqmodel.safetensors")


@pytest.mark.parametrize(
    ("quantization", "pack"),
    [
        ({"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": True}, gptq(32)),
        ({"quant_method": "gptq", "bits": 4, "group_size": 32, "checkpoint_format": "gptq_v2"}, gptq(32, version=2)),
        ({"quant_method": "awq", "bits": 4, "group_size": 32}, awq(32)),
    ],
)
def test_the_packers_that_other_tests_use(quantization, pack):
    check(opened(**quantization), *pack(torch.randn(OUT, IN)))


def test_mxfp4_as_transformers_dequantizes_it():
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    blocks = torch.randint(0, 256, (3, OUT, IN // 32, 16), dtype=torch.uint8)
    scales = torch.randint(100, 140, (3, OUT, IN // 32), dtype=torch.uint8)
    wanted = convert_moe_packed_tensors(blocks, scales)
    form = opened(quant_method="mxfp4")
    stored = headers(form, {"blocks": blocks, "scales": scales}, "mlp.experts.down_proj")
    assert list(form.problems("mlp.experts.down_proj", stored, (3, IN, OUT))) == []
    for expert in range(3):
        parts = {"blocks": blocks[expert], "scales": scales[expert]}
        assert torch.equal(form.decode(parts, (IN, OUT), torch.bfloat16), wanted[expert])
        assert check_packed(form, parts, (IN, OUT), "mlp.experts.down_proj", (3,)) == "int4 32"
    blocks, scales, rounded = mxfp4(torch.randn(OUT, IN))
    assert torch.equal(form.decode({"blocks": blocks, "scales": scales}, (IN, OUT)), rounded.T)


def test_every_exponent():
    """Of MXFP4 and of blocks of FP8; the last one is no number."""
    exponents = torch.arange(256, dtype=torch.uint8)
    wanted = exponents.view(torch.float8_e8m0fnu).float()
    for found in (powers_of_two(exponents), exponents.view(torch.float8_e8m0fnu).bfloat16()):
        assert torch.equal(found.float()[:255], wanted[:255]) and not found[255].isfinite()


F32, F16, BF16, E8M0 = torch.float32, torch.float16, torch.bfloat16, torch.float8_e8m0fnu


@pytest.mark.parametrize(
    ("block", "scale", "wanted"),
    [
        ([32, 64], (2, 2, F32), "e4m3 64"), ([128, 128], (1, 1, BF16), "e4m3 96"), ([32, 64], (2, 2, F16), "e4m3 64"),
        ([32, 64], (2, 2, E8M0), "e4m3 64"), ([32, 32], (2, 3, F32), ""), ([32, 96], (2, 1, F32), "e4m3 96"),
        ([32, 48], (2, 2, F32), ""), (None, (OUT, 1, F32), "e4m3 96"), (None, (OUT, F16), "e4m3 96"), (None, (1, BF16), "e4m3 96"),
        (None, (F32,), "e4m3 96"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("experts", [(), (3,)])
def test_fp8_for_the_kernels(block, scale, wanted, experts):
    *shape, dtype = scale
    form = opened(quant_method="fp8", weight_block_size=block)
    parts = {WHOLE: torch.randn(OUT, IN).to(torch.float8_e4m3fn), "scale": (torch.rand(shape) + 0.5).to(dtype)}
    assert check_packed(form, parts, (OUT, IN), experts=experts) == wanted


@pytest.mark.parametrize(
    ("scheme", "wanted"),
    [
        (("pack-quantized", "int", 4, "group", 32), "int4 32"), (("pack-quantized", "int", 4, "channel", None), "int4 96"),
        (("pack-quantized", "int", 4, "group", 32, False), "int4 32"), (("int-quantized", "int", 8, "channel", None, False), ""),
        (("pack-quantized", "int", 8, "group", 32), ""), (("pack-quantized", "int", 4, "group", 16), ""),
        (("int-quantized", "int", 8, "channel", None), "int8 96"), (("float-quantized", "float", 8, "tensor", None), "e4m3 96"),
    ],
)  # fmt: skip
def test_compressed_tensors_for_the_kernels(scheme, wanted):
    form, kind, bits, strategy, group, *symmetric = scheme
    weights = {
        "num_bits": bits,
        "type": kind,
        "strategy": strategy,
        "group_size": group,
        "symmetric": symmetric != [False],
    }
    config = {"format": form, "targets": ["Linear"], "weights": weights}
    found = opened(quant_method="compressed-tensors", format=form, config_groups={"group_0": config})
    for dtype in (torch.bfloat16, torch.float32):
        parts = parts_of(found, compressed(config, dtype)(torch.randn(OUT, IN))[0])
        assert check_packed(found, parts, (OUT, IN)) == wanted


def test_widths_that_fill_no_words():
    """compressed-tensors pads rows; the kernels take them where they fill bytes."""
    for width in (94, 95):
        weights = {"num_bits": 4, "type": "int", "strategy": "channel", "symmetric": True}
        config = {"format": "pack-quantized", "targets": ["Linear"], "weights": weights}
        form = opened(quant_method="compressed-tensors", format="pack-quantized", config_groups={"group_0": config})
        parts = {"packed": torch.randint(2**31 - 1, (OUT, 12)).int(), "scale": torch.rand(OUT, 1)}
        weight = StoredWeight("model.q_proj.weight", form, headers(form, parts), (OUT, width))
        assert (weight.packing is None) is (width == 95)
        if weight.packing is not None:
            found = weight.packed(parts, weight.packing)
            assert torch.equal(found.dequantize(), form.decode(parts, (OUT, width)))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_scales_that_are_not_finite(value):
    form = opened(quant_method="fp8")
    parts = {WHOLE: torch.randn(OUT, IN).to(torch.float8_e4m3fn), "scale": torch.tensor(value)}
    weight = StoredWeight("model.q_proj.weight", form, headers(form, parts), (OUT, IN))
    with pytest.raises(KTModelError, match=r"^f: model\.q_proj\.weight has scales that are not finite"):
        weight.packed(parts, weight.packing)


def test_every_code_of_the_small_floats():
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    assert torch.equal(widened(codes).nan_to_num(1e9), codes.float().nan_to_num(1e9))
    finite = torch.tensor([n for n in range(256) if n & 127 != 127], dtype=torch.uint8).view(torch.float8_e4m3fn)
    assert torch.equal(widened(finite), finite.float()), "the fast way"
    values = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    found = e2m1(torch.arange(16, dtype=torch.uint8))
    assert torch.equal(found, torch.cat([values, -values])) and bool(found[8].signbit())


@pytest.mark.parametrize(
    ("quantization", "suffix", "shapes"),
    [
        ({"quant_method": "fp8"}, "weight_scale_inv", [(), (1,)]),
        ({"quant_method": "fbgemm_fp8"}, "weight_scale", [(OUT, 1), (OUT,)]),
        ({"quant_method": "modelopt", "quant_algo": "FP8"}, "weight_scale", [(), (1,), (OUT, 1)]),
    ],
)
def test_fp8_with_one_scale_for_a_weight_or_row(quantization, suffix, shapes):
    weight = torch.randn(OUT, IN).to(torch.float8_e4m3fn)
    for shape in shapes:
        scale = torch.rand(shape) + 0.5
        wanted = weight.float() * (scale.reshape(-1, 1) if scale.numel() > 1 else scale)
        check(opened(**quantization), {"weight": weight, suffix: scale}, wanted)


def test_fused_fp8_experts_with_one_scale_each():
    form = opened(quant_method="fp8")
    weight, scale = torch.randn(3, OUT, IN).to(torch.float8_e4m3fn), torch.rand(3) + 0.5
    stored = headers(form, {WHOLE: weight, "scale": scale}, "mlp.experts.down_proj")
    assert list(form.problems("mlp.experts.down_proj", stored, (3, OUT, IN))) == []
    found = form.decode({WHOLE: weight[1], "scale": scale[1]}, (OUT, IN))
    assert torch.equal(found, weight[1].float() * scale[1])


def test_several_schemes_in_one_checkpoint():
    """A name says more than a class; what is not named is what the class says."""

    def scheme(bits, *targets):
        weights = {"num_bits": bits, "type": "int", "strategy": "group", "group_size": 32, "symmetric": True}
        return {"targets": list(targets), "format": "pack-quantized", "weights": weights}

    four, eight = scheme(4, "Linear"), scheme(8, "re:.*self_attn.*")
    form = opened(quant_method="compressed-tensors", format="mixed-precision", config_groups={"a": four, "b": eight})
    for name, wanted in (("model.self_attn.q_proj.weight", eight), ("model.mlp.up_proj.weight", four)):
        stored, plain = compressed(wanted)(torch.randn(OUT, IN))
        parts = parts_of(form, stored)
        assert list(form.problems(name, headers(form, parts, name), (OUT, IN))) == []
        assert torch.equal(form.decode(parts, (OUT, IN), torch.bfloat16).float(), plain)
    assert form.label(headers(form, parts)) == "INT4"


PACK = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32, "symmetric": True}
SCHEME = {"format": "pack-quantized", "targets": ["Linear"], "weights": PACK}
CT = {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {"group_0": SCHEME}}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: p.pop("scale"), "model.q_proj.weight_scale is missing"),
        (lambda p: p.update(scale=p["scale"][:, :2]), r"weight_scale is BF16 \(64, 2\), wanted F32 or BF16 or F16 \(64, 3\)"),
        (lambda p: p.update(packed=p["packed"][:, :8]), r"weight_packed is I32 \(64, 8\), wanted I32 \(64, 12\)"),
        (lambda p: p.update(zero=torch.zeros(8, 3, dtype=torch.int32)), "weight_zero_point is not part of compressed-tensors weights"),
    ],
)  # fmt: skip
def test_parts_that_do_not_fit(change, message):
    form = opened(**CT)
    parts = parts_of(form, compressed(SCHEME)(torch.randn(OUT, IN))[0])
    change(parts)
    [problem] = form.problems("model.q_proj.weight", headers(form, parts), (OUT, IN))
    assert __import__("re").search(message, problem), problem


@pytest.mark.parametrize(
    ("quantization", "message"),
    [
        ({"quant_method": "fp8", "weight_block_size": [128]}, r"weight_block_size is \[128\], wanted two sizes"),
        ({"quant_method": "fp8", "fmt": "e5m2"}, "fmt: e5m2"),
        ({"quant_method": "modelopt", "quant_algo": "NVFP4_AWQ"}, "quant_algo: NVFP4_AWQ"),
        ({**CT, "format": "mxfp4-pack-quantized", "config_groups": {"g": {**SCHEME, "format": None}}}, "format: mxfp4-pack-quantized"),
        ({**CT, "config_groups": {"g": {**SCHEME, "weights": {**PACK, "num_bits": 3}}}}, "num_bits: 3"),
        ({**CT, "sparsity_config": {"format": "sparse-24-bitmask"}}, "is sparse"),
        ({"quant_method": "gptq", "bits": 3}, "bits: 3"),
        ({"quant_method": "gptq", "bits": 4, "checkpoint_format": "marlin"}, "checkpoint_format: marlin"),
        ({"quant_method": "compressed-tensors", "config_groups": {"W4A16": ["Linear"]}}, "config_groups.W4A16 is .*, wanted an object"),
        ({"quant_method": "gptq", "bits": 4, "dynamic": {"+:.*q_proj": {"bits": 3}}}, "dynamic: .'\\+:.*q_proj'"),
        ({"quant_method": "awq", "bits": 4, "version": "gemv"}, "version: gemv"),
        *(({"quant_method": method}, f"quant_method: {method} in config.json") for method in ("bitsandbytes", "gguf", "hqq", None)),
    ],
)  # fmt: skip
def test_variants_that_cannot_be_read(quantization, message):
    with pytest.raises(KTModelError, match=message):
        opened(**quantization)


def test_names_are_split_and_put_together_again():
    for kind in FORMATS:
        form = kind.__new__(kind)
        for part in kind.parts:
            weight = "model.layers.1.mlp.up_proj.weight"
            assert form.split(form.stored_name(weight, part)) == (weight, part)
        for ending in kind.unused:
            name = f"model.layers.1.mlp.up_proj{'' if ending.startswith('.') else '.'}{ending}"
            assert form.split(name) == (name, WHOLE), "not part of a weight"
