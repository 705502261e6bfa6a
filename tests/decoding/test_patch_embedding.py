"""The Conv3d that cuts pictures into patches, computed as a product, compared with PyTorch's convolution."""

from __future__ import annotations

import copy

import pytest
import torch
from helpers.references import rel
from torch import nn

from llamafactory_kt.decoding.patch_embedding import cut_patches_by_convolutions, cut_patches_by_products

SIZES = {"kernel_size": (2, 3, 4), "stride": (2, 3, 4)}


@pytest.mark.parametrize("more", [{}, {"bias": False}, {"padding": "valid"}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.inference_mode()
def test_equal_to_the_convolution(more, dtype):
    torch.manual_seed(0)
    conv = nn.Conv3d(3, 5, **SIZES, **more).to(dtype)
    model = nn.Sequential(copy.deepcopy(conv))
    cut_patches_by_products(model)
    assert not isinstance(model[0], nn.Conv3d) and list(model.state_dict()) == [
        f"0.{name}" for name in conv.state_dict()
    ]
    for shape in ((4, 3, 2, 3, 4), (2, 3, 4, 6, 12), (1, 3, 5, 7, 9)):  # one window each, several, and some left over
        x = torch.randn(shape, dtype=dtype)
        exact = conv.double()(x.double())
        conv.to(dtype)
        found = model(x)
        assert found.shape == exact.shape and found.dtype == dtype
        assert rel(found, exact) < 1.1 * rel(conv(x), exact) + 1e-6
    cut_patches_by_convolutions(model)
    assert type(model[0]) is nn.Conv3d and torch.equal(model(x), conv(x))


@pytest.mark.parametrize(
    "other", [{"stride": (2, 3, 3)}, {"padding": (0, 0, 1)}, {"padding": "same", "stride": 1}, {"dilation": (1, 2, 1)}, {"groups": 3}]
)  # fmt: skip
def test_other_convolutions_are_left(other):
    model = nn.Sequential(nn.Conv3d(3, 6, **{**SIZES, **other}), nn.Conv2d(3, 6, 2, 2))
    cut_patches_by_products(model)
    assert type(model[0]) is nn.Conv3d and type(model[1]) is nn.Conv2d
