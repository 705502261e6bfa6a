"""Products of float32 with bfloat16 weights."""

from __future__ import annotations

import pytest
import torch
from helpers.marks import needs_onednn

from llamafactory_kt.matmul import linear


@needs_onednn
@pytest.mark.parametrize("block", [1, 5 * 48, 2**20])
def test_blocks_that_do_not_divide_a_weight(block):
    x, weight, bias = torch.randn(2, 9, 48), torch.randn(32, 48).bfloat16(), torch.randn(32).bfloat16()
    found = linear._in_blocks(x, weight, bias, block)
    torch.testing.assert_close(found.double(), x.double() @ weight.double().T + bias.double(), rtol=1e-5, atol=1e-5)
