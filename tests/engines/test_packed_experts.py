"""Experts that are quantized in the checkpoint, as the native engine multiplies them: a layer against float64 sums over what the codes stand
for, with LoRA on top."""

from __future__ import annotations

import pytest
import torch
from helpers.experts import TOP_K, batch, lora_for, reference
from helpers.marks import needs_native
from helpers.references import rel

from llamafactory_kt.adapters import ExpertsShape
from llamafactory_kt.checkpoint.expert_weights import LayerWeights
from llamafactory_kt.engines.options import EngineOptions, EngineSpec
from llamafactory_kt.engines.registry import get_engine
from llamafactory_kt.native.library import in_panels
from llamafactory_kt.native.packed import ALL, E2M1, PackedExpert, PackedWeight, Packing

pytestmark = needs_native
SHAPE = ExpertsShape(num_experts=5, hidden_size=320, intermediate_size=192)
RANK = 5
F32 = torch.float32
PACKINGS = {
    "INT4": Packing("int4"),
    "INT4 with zero points": Packing("int4", 64, scale_dtype=F32, has_offsets=True),
    "INT4 in rows with zero points": Packing("int4", ALL, has_offsets=True),
    "MXFP4": Packing("int4", table=E2M1),
    "INT8 in rows": Packing("int8", ALL),
    "INT8 with zero points": Packing("int8", 128, has_offsets=True),
    "FP8 in blocks": Packing("e4m3", 128, 128, F32),
    "FP8 as a whole": Packing("e4m3", ALL, ALL, F32),
}


def drawn(packing: Packing, rows: int, cols: int, generator: torch.Generator) -> PackedWeight:
    codes = torch.randint(0, 256, (rows, cols * packing.bits // 8), dtype=torch.uint8, generator=generator)
    if packing.kind == "e4m3":
        codes[codes & 127 == 127] -= 1  # NaN
    groups, shared = packing.sizes(1, cols)[1], -(-rows // packing.rows_of_scale)
    scales = torch.rand(shared, groups, generator=generator) + 0.5
    offsets = in_panels(torch.randn(rows, groups, generator=generator)) if packing.has_offsets else None
    size = PackedWeight(packing, codes, scales.to(packing.scale_dtype)).dequantize().std() * cols**0.5
    offsets = offsets * cols**-0.5 if offsets is not None else None
    return PackedWeight(packing, codes, (scales / size).to(packing.scale_dtype), offsets)


@pytest.fixture(scope="module", params=PACKINGS)
def experts(request) -> list[PackedExpert]:
    generator = torch.Generator().manual_seed(0)
    sizes = [SHAPE.projection(projection) for projection in ("gate", "up", "down")]
    return [
        PackedExpert(*(drawn(PACKINGS[request.param], *size, generator) for size in sizes))
        for _ in range(SHAPE.num_experts)
    ]


def decoded(experts: list[PackedExpert]) -> LayerWeights:
    return LayerWeights(
        *(torch.stack([matrix.dequantize() for matrix in matrices]) for matrices in zip(*experts, strict=True))
    )


def loaded(experts: list[PackedExpert], mapped: bool):
    spec = EngineSpec(0, SHAPE, TOP_K, RANK, read_packed=lambda: iter(experts))
    engine = get_engine("native")(spec, lambda dtype: pytest.fail("nothing is decoded"), EngineOptions(mapped=mapped))
    engine.load()
    return engine


@pytest.mark.parametrize("mapped", [True, False])
@pytest.mark.parametrize("tokens", [1, 4, 100])
def test_a_layer_with_lora(experts, tokens, mapped):
    engine, weights, lora = loaded(experts, mapped), decoded(experts), lora_for(SHAPE, RANK, 0.7)
    for given in (None, lora):
        engine.set_lora(given)
        x, index, scores = batch(SHAPE, tokens)
        found = engine.forward(x.float(), index, scores)
        assert rel(found, reference(weights, given, x, index, scores)) < 0.007, (
            "bfloat16 activations and, for many tokens, weights"
        )
    assert rel(reference(weights, lora, x, index, scores), reference(weights, None, x, index, scores)) > 0.1


def test_what_it_holds(experts):
    copied = loaded(experts, mapped=False)
    packing = experts[0].up.packing
    wanted = sum(packing.nbytes(*SHAPE.projection(projection)) for projection in SHAPE.projections) * SHAPE.num_experts
    assert copied.nbytes == wanted == loaded(experts, mapped=True).nbytes
    assert copied.holds_packed
    for mine, given in zip(copied._weights, experts, strict=True):
        for a, b in zip(mine, given, strict=True):
            assert all(torch.equal(x, y) for x, y in zip(a.tensors, b.tensors, strict=True))
            assert a.codes.data_ptr() % 64 == 0 and a.codes.data_ptr() != b.codes.data_ptr()


@pytest.mark.parametrize("packing", [Packing("int4", 32), Packing("e4m3", 64, 32), Packing("int8", has_offsets=True)])
def test_some_rows(packing):
    """As gate and up are split, or none of a gate that is not there."""
    whole = drawn(packing, 96, 128, torch.Generator().manual_seed(1))
    parts = [slice(0, 32), slice(32, 96), slice(0)] + ([slice(1, 96, 2)] if packing.rows_together == 1 else [])
    for rows in parts:
        assert torch.equal(whole[rows].dequantize(), whole.dequantize()[rows])
    if packing.rows_together > 1:
        with pytest.raises(AssertionError):
            whole[8:96]
