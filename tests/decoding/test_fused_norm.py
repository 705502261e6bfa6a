"""Norms as one call: those that are RMSNorm compute the same, and others are left."""

from __future__ import annotations

from itertools import chain

import pytest
import torch
from helpers.marks import needs_native
from helpers.references import rel
from torch import nn

from llamafactory_kt.decoding.fused_norm import FusedNorm, fuse_norms

pytestmark = needs_native


class Norm(nn.Module):
    """transformers' usual RMSNorm, of the size, and with what some models add to it."""

    def __init__(self, size: int, offset: float = 0.0, round_first: bool = True, scale: float = 1.0):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(size), requires_grad=False)
        self.eps, self.offset, self.round_first, self.scale = 1e-6, offset, round_first, scale

    def forward(self, x):
        wide = x.float()
        found = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        if self.round_first:
            return self.weight * found.to(x.dtype) * self.scale
        return (found * (self.offset + self.weight.float()) * self.scale).to(x.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [5, 64, 130])
def test_they_compute_the_same(dtype, size):
    """Also where two of one class differ in an attribute."""
    norms = [Norm(size), Norm(size, 1.0, False), Norm(size, 0.0, False), Norm(size, scale=2.0), nn.LayerNorm(size)]
    model = nn.ModuleList(norms).to(dtype)
    inputs = [torch.randn(1, 1, size), torch.randn(300, 2 * size)[:, :size], torch.randn(0, size)]
    with torch.no_grad():
        wanted = [[norm(x.to(dtype)) for x in inputs] for norm in model]
        fuse_norms(model)
        found = [[norm(x.to(dtype)) for x in inputs] for norm in model]
        assert model[0](torch.ones(2, 1, dtype=dtype)).shape == (2, size), "PyTorch repeats a lone value"
        with pytest.raises(RuntimeError, match="must match the size"):
            model[0](torch.ones(2, size - 1, dtype=dtype))
    assert [isinstance(norm, FusedNorm) for norm in model] == [True, True, True, False, False]
    bound = {torch.float32: 1e-6, torch.bfloat16: 2e-3, torch.float16: 3e-4}[dtype]
    for one, other in zip(chain(*found), chain(*wanted), strict=True):
        assert one.shape == other.shape and one.dtype == dtype
        assert not other.numel() or rel(one, other) < bound


class Gated(Norm):
    """As in Mamba's blocks of Granite's hybrids."""

    def forward(self, x, gate=None):
        return super().forward(x if gate is None else x * nn.functional.silu(gate))


def test_a_norm_with_a_gate():
    norm, x, gate = Gated(64), torch.randn(3, 64), torch.randn(3, 64)
    with torch.no_grad():
        wanted = norm(x), norm(x, gate)
        fuse_norms(norm)
        found = norm(x), norm(x, gate), norm(x, gate=gate)
    assert isinstance(norm, FusedNorm) and rel(found[0], wanted[0]) < 1e-6
    assert torch.equal(found[1], wanted[1]) and torch.equal(found[2], wanted[1])
