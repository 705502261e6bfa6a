"""Weights in oneDNN's layout, in memory that this project provides: their values, their addresses, and their lifetime."""

import gc
import mmap
import weakref

import pytest
import torch

from llamafactory_kt.matmul import mkldnn_blob
from llamafactory_kt.matmul.linear import linear
from llamafactory_kt.matmul.mkldnn_blob import OneDNNPlaces, as_parameter
from llamafactory_kt.matmul.mkldnn_ops import has_bfloat16_kernels

pytestmark = pytest.mark.skipif(not has_bfloat16_kernels(), reason="oneDNN has no bfloat16 kernels here, so no layout")

SIZE = 96, 80


@pytest.fixture
def weights() -> list[torch.Tensor]:
    return [torch.randn(SIZE, generator=torch.Generator().manual_seed(n)).bfloat16() for n in range(3)]


def addresses(placed: list[torch.Tensor]) -> list[int]:
    return [torch.ops.mkldnn.data_ptr(weight) for weight in placed]


@pytest.mark.parametrize("parts", [1, 2])
def test_in_a_block(weights, parts):
    place = OneDNNPlaces(SIZE, len(weights))
    placed = [place(number, *weight.chunk(parts)) for number, weight in enumerate(weights)]
    first, second, third = addresses(placed)
    assert first % mmap.PAGESIZE == 0
    assert 0 < second - first == third - second < 2 * SIZE[0] * SIZE[1] * 2, (
        "oneDNN pads small ones, torch 2.11's by half"
    )
    x = torch.randn(5, SIZE[1]).bfloat16()
    for own, weight in zip(placed, weights, strict=True):
        assert own.shape == SIZE and own.dtype == torch.bfloat16 and own.layout != torch.strided
        assert torch.equal(own.to_dense(), weight)
        torch.testing.assert_close(linear(x, own).float(), x.float() @ weight.float().T, atol=0.1, rtol=0.02)


def test_without_torchs_interface(weights, monkeypatch):
    monkeypatch.setattr(mkldnn_blob, "_can_adopt", lambda: False)
    place = OneDNNPlaces(SIZE, len(weights))
    for number, weight in enumerate(weights):
        assert torch.equal(place(number, weight).to_dense(), weight)


def test_memory_stays_with_a_parameter_and_goes_with_it():
    size = 2048, 2048
    weight = torch.randn(size).bfloat16()
    placed = OneDNNPlaces(size, 2)(1, weight)
    memory = weakref.ref(vars(placed.native)[mkldnn_blob._MEMORY])
    parameter = as_parameter(placed)
    del placed
    gc.collect()
    assert memory() is not None
    assert torch.equal(parameter.detach().to_dense(), weight)
    del parameter
    gc.collect()
    assert memory() is None
