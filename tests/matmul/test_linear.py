"""Products of float32 with bfloat16 weights."""

from __future__ import annotations

import pytest
import torch
from helpers.marks import needs_onednn
from helpers.references import rel

from llamafactory_kt.matmul import linear


@needs_onednn
@pytest.mark.parametrize("size", [(32, 48), (2 * (linear.BLOCK // 768) + 5, 768), (3, linear.BLOCK + 8)], ids=str)
def test_blocks_that_do_not_divide_a_weight(size):
    """A block that is larger than the weight; some blocks and a remainder; and one row larger than a block."""
    x, weight, bias = torch.randn(2, 3, size[1]), torch.randn(size).bfloat16(), torch.randn(size[0]).bfloat16()
    found = linear.product(x, weight, bias, wide=True, numbers=linear.numbers(weight), threads=1)
    assert found.dtype == torch.float32 and found.shape == (2, 3, size[0])
    assert rel(found.double(), x.double() @ weight.double().T + bias.double()) < 1e-5
