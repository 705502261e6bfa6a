"""Codes and scales: how much of a weight they keep, and what cannot be quantized. ``check_kernels.cpp`` compares the products."""

from __future__ import annotations

import pytest
import torch
from helpers.marks import needs_native
from helpers.references import rel

from llamafactory_kt.native.packed import E2M1, PackedWeight, Packing, quantize

pytestmark = needs_native
BITS = [4, 8]


def packed(weight: torch.Tensor, bits: int) -> PackedWeight:
    codes, scales = Packing(f"int{bits}").sizes(*weight.shape)
    return quantize(
        weight, bits, torch.full([codes], 99, dtype=torch.uint8), torch.full([scales], torch.nan, dtype=torch.bfloat16)
    )


@pytest.mark.parametrize(("bits", "bound"), [(4, 0.082), (8, 0.0055)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
def test_gaussian_weights(bits, bound, dtype):
    weight = torch.randn(64, 544, generator=torch.Generator().manual_seed(bits)).to(dtype)
    found = packed(weight, bits)
    assert found.shape == weight.shape and found.nbytes == found.packing.nbytes(*weight.shape)
    assert 0.9 * bound < rel(found.dequantize(), weight) < bound


@pytest.mark.parametrize("bits", BITS)
def test_integers_times_a_power_of_two_stay_as_they_are(bits):
    """Of each group, one is the largest in magnitude; the last group of a row is not full."""
    highest = 8 if bits == 4 else 127
    codes = torch.randint(1 - highest, highest, (17, 70), generator=torch.Generator().manual_seed(0)).float()
    codes[:, ::32] = -highest
    weight = codes * 2.0 ** torch.arange(-8, 9)[:, None]
    assert torch.equal(packed(weight, bits).dequantize(), weight)


@pytest.mark.parametrize("bits", BITS)
def test_rows_apart_and_zeros(bits):
    whole = torch.randn(9, 200, generator=torch.Generator().manual_seed(3))
    whole[4] = 0
    apart = packed(whole[:, :96], bits)
    assert torch.equal(apart.dequantize(), packed(whole[:, :96].contiguous(), bits).dequantize())
    assert torch.equal(packed(whole.T.contiguous().T, bits).codes, packed(whole, bits).codes)
    assert not apart.dequantize()[4].any()


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_is_refused(bits, value):
    weight = torch.randn(5, 64)
    weight[3, 33] = value
    with pytest.raises(ValueError, match="not finite"):
        packed(weight, bits)


def test_what_codes_stand_for():
    """The lower half of a byte comes first."""
    scales = torch.tensor([[2.0], [0.5]], dtype=torch.bfloat16)
    table = PackedWeight(Packing("int4", table=E2M1), torch.tensor([[0x71], [0xF0]], dtype=torch.uint8), scales)
    assert table.dequantize().tolist() == [[1.0, 12.0], [0.0, -3.0]]
    bytes_of = torch.tensor([[0x80, 0x7F], [1, 0xFF]], dtype=torch.uint8)
    assert PackedWeight(Packing("int8"), bytes_of, scales).dequantize().tolist() == [[-256.0, 254.0], [0.5, -0.5]]
    shared = PackedWeight(Packing("e4m3", 128, rows_of_scale=2), bytes_of, scales[:1])
    assert shared.dequantize().tolist()[1] == [2 * 2.0**-9, pytest.approx(torch.nan, nan_ok=True)]
