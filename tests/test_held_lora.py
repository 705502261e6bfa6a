"""LoRA of several experts in one product."""

from __future__ import annotations

import pytest
import torch
from test_experts import lora_for

from llamafactory_kt.adapters import ExpertsShape
from llamafactory_kt.experts.grouped_lora import Batch, GroupedLora, add_lora, batches, lora_size

SHAPE = ExpertsShape(9, 40, 24)
MIXED = {0: 6, 1: 7, 2: 3, 4: 9, 5: 90, 6: 91}
"""one without rows among others with as many, two with many more, and none for the last ones"""


def test_batches():
    assert batches(MIXED) == [Batch(0, [6, 7, 3, 0, 9]), Batch(5, [90]), Batch(6, [91])], (
        "6 x 90 rows would be too many for 115"
    )
    assert batches({0: 1, 1: 5, 2: 1, 3: 1, 5: 9}) == [Batch(0, [1, 5, 1, 1]), Batch(5, [9])], (
        "4 x 5 for 8, not 6 x 9 for 17"
    )
    assert batches({2: 1, 3: 1, 4: 1, 5: 1, 7: 1}) == [Batch(e, [1]) for e in (2, 3, 4, 5, 7)], "an answer's token"
    assert batches({1: 2, 2: 2, 4: 2}) == [Batch(e, [2]) for e in (1, 2, 4)] and batches({3: 300}) == [Batch(3, [300])]


@pytest.mark.parametrize(
    "group", [MIXED, {1: 1, 2: 1}, {0: 9, 1: 9, 2: 9, 3: 9}, {8: 30}, {3: 1, 4: 3, 7: 4, 8: 2}], ids=str
)
def test_against_each_experts_change_of_its_weights(group):
    """With ΔW in float64."""
    lora = lora_for(SHAPE, rank=5, scaling=3.2)
    held, rows = GroupedLora(lora), list(group.values())
    assert held.nbytes == lora_size(SHAPE, rank=5), "as MemoryNeed has it"
    for factors, projections in ((held.gate_up, ("gate", "up")), (held.down, ("down",))):
        sizes = [SHAPE.projection(p) for p in projections]
        x, sums = torch.randn(sum(rows), sizes[0][1]), torch.randn(sum(rows), sum(out for out, _ in sizes))
        wanted = [
            part.double() + torch.cat([own.double() @ lora.delta(p, expert).double().T for p in projections], dim=1)
            for expert, own, part in zip(group, x.split(rows), sums.split(rows), strict=True)
        ]
        found = add_lora(factors, batches(group), x, sums)
        assert found is sums
        torch.testing.assert_close(found.double(), torch.cat(wanted), rtol=1e-5, atol=1e-4)
