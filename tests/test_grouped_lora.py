"""LoRA of several experts in one product."""

from __future__ import annotations

import pytest
import torch
from test_experts import lora_for

from llamafactory_kt.adapters import ExpertsShape
from llamafactory_kt.experts.grouped_lora import Batch, GroupedLora, add_lora, batches, lora_size

SHAPE = ExpertsShape(9, 40, 24)
NO_MORE_THAN_TWICE = {0: 6, 1: 7, 2: 3, 4: 9, 5: 39, 6: 41, 8: 1}
"""an expert without rows among others, some with many, and one whose neighbour's rows are too many for it"""


def test_batches():
    together = [Batch(0, [6, 7, 3, 0, 9]), Batch(5, [39, 41]), Batch(8, [1])]
    assert batches(NO_MORE_THAN_TWICE) == together, (
        "5 x 9 rows for 25, 2 x 41 for 80; 4 x 41 would be more than twice 81"
    )
    assert batches({2: 1, 3: 1, 4: 1, 7: 1}) == [Batch(e, [1]) for e in (2, 3, 4, 7)], "an answer's token"
    assert batches({1: 15, 3: 17}) == [Batch(1, [15, 0, 17])] and batches({3: 300}) == [Batch(3, [300])]
    assert batches({0: 1, 1: 17}) == [Batch(0, [1, 17])] and batches({0: 1, 2: 17}) == [Batch(0, [1]), Batch(2, [17])]


@pytest.mark.parametrize(
    "group", [NO_MORE_THAN_TWICE, {1: 1, 2: 1}, {0: 9, 1: 9}, {8: 30}, {0: 1, 1: 30, 3: 31}], ids=str
)
def test_against_each_experts_change_of_its_weights(group):
    """With ΔW in float64."""
    lora = lora_for(SHAPE, rank=5, scaling=3.2)
    held, rows = GroupedLora(lora), list(group.values())
    assert held.nbytes == lora_size(SHAPE, rank=5), "as MemoryNeed has it"
    for pair, projections in ((held.gate_up, ("gate", "up")), (held.down, ("down",))):
        sizes = [SHAPE.projection(p) for p in projections]
        x, sums = torch.randn(sum(rows), sizes[0][1]), torch.randn(sum(rows), sum(out for out, _ in sizes))
        wanted = [
            part.double() + torch.cat([own.double() @ lora.delta(p, expert).double().T for p in projections], dim=1)
            for expert, own, part in zip(group, x.split(rows), sums.split(rows), strict=True)
        ]
        found = add_lora(pair, batches(group), x, sums)
        assert found is sums
        torch.testing.assert_close(found.double(), torch.cat(wanted), rtol=1e-5, atol=1e-4)
