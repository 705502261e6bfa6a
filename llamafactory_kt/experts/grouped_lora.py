"""LoRA of a layer's experts on the CPU, in few products.

One expert's product with its LoRA is so small that calling it is what it costs, and that grows with the threads that have to
meet at its end. So experts side by side share one product, in which those with fewer rows have rows that are not used.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from ..adapters import ExpertLora, ExpertsShape
from ..used_memory import in_large_pages

TOGETHER = 4
"""experts, or more, that share a product; fewer are multiplied one by one"""
_FILLED = 3
"""times the rows that there are, at most, are computed"""


def lora_size(shape: ExpertsShape, rank: int) -> int:
    """Bytes of a LoRA as :class:`GroupedLora` holds it, float32 with gate's and up's B on a diagonal."""
    return 4 * shape.num_experts * rank * (3 * shape.hidden_size + 5 * shape.intermediate_size)


class Factors:
    """A and B of all experts."""

    def __init__(self, a: torch.Tensor, b: torch.Tensor):
        self.a = a
        """[E, in, r]"""
        self.b = b
        """[E, r, out]"""
        self.each = list(zip(a, b, strict=True))
        """of each expert; taking them out would cost every token a step for each"""

    @property
    def nbytes(self) -> int:
        """Of both."""
        return self.a.nbytes + self.b.nbytes


@dataclass
class Batch:
    """Experts side by side whose rows are multiplied together, or one alone."""

    first: int
    """number of the first expert"""
    counts: list[int]
    """rows of each"""

    @property
    def stop(self) -> int:
        """Number of the expert after the last one."""
        return self.first + len(self.counts)

    @property
    def rows(self) -> int:
        """Of all its experts."""
        return sum(self.counts)

    def apart(self) -> list[Batch]:
        """Itself, or each of its experts alone where they are few."""
        if len(self.counts) - self.counts.count(0) >= TOGETHER:
            return [self]
        return [Batch(self.first + number, [rows]) for number, rows in enumerate(self.counts) if rows]

    @cached_property
    def places(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Where as many rows for each expert as the longest has lie side by side: (row that each place takes, some of them
        in vain; place of each row)."""
        counts = torch.tensor(self.counts)
        used = (torch.arange(max(self.counts)) < counts[:, None]).flatten()
        return used.cumsum(0).sub_(1), used.nonzero().squeeze(1)


def batches(group: Mapping[int, int]) -> list[Batch]:
    """The experts of a group (expert -> rows) in turn, those in one that share a product."""
    # For an answer's token, LoRA of experts in between would be read from memory in vain.
    if max(group.values()) == 1:
        return [Batch(expert, [1]) for expert in group]
    runs: list[Batch] = []
    most = rows = 0
    for expert, own in group.items():
        most, rows = max(most, own), rows + own
        if runs and most * (expert + 1 - runs[-1].first) <= _FILLED * rows:
            runs[-1].counts.extend([0] * (expert - runs[-1].stop) + [own])
        else:
            runs.append(Batch(expert, [own]))
            most = rows = own
    return [batch for run in runs for batch in run.apart()]


def add_lora(factors: Factors, group: Sequence[Batch], x: torch.Tensor, sums: torch.Tensor) -> torch.Tensor:
    """Add x @ A @ B of each row's expert to sums in place: x [n, in], sums [n, out], both float32, rows as in the group."""
    sizes = [batch.rows for batch in group]
    for batch, part, own in zip(group, x.split(sizes), sums.split(sizes), strict=True):
        if len(batch.counts) == 1:
            a, b = factors.each[batch.first]
            own.addmm_(part.mm(a), b)
            continue
        taken, places = batch.places
        experts = slice(batch.first, batch.stop)
        rows = part[taken].unflatten(0, (len(batch.counts), -1))
        own.add_(rows.bmm(factors.a[experts]).bmm(factors.b[experts]).flatten(0, 1)[places])
    return sums


class GroupedLora:
    """A layer's LoRA as :func:`add_lora` reads it."""

    def __init__(self, lora: ExpertLora):
        experts, rank, hidden = lora.a["gate"].shape
        size = lora.a["down"].shape[2]

        def empty(*shape: int) -> torch.Tensor:
            return in_large_pages(torch.empty(experts, *shape, dtype=torch.float32, device="cpu"))

        # In float32, whose products of this size take a third of the time of bfloat16's. The zeros beside the diagonal are
        # read faster than a second product is called.
        a, b = empty(2 * rank, hidden), empty(2 * rank, 2 * size).zero_()
        for half, projection in enumerate(("gate", "up")):
            rows = slice(half * rank, (half + 1) * rank)
            a[:, rows] = lora.a[projection]
            lora.folded(projection, 1.0, b[:, rows, half * size : (half + 1) * size].transpose(1, 2))
        down_a, down_b = empty(rank, size).copy_(lora.a["down"]), empty(rank, hidden)
        lora.folded("down", 1.0, down_b.transpose(1, 2))
        self.gate_up = Factors(a.transpose(1, 2), b)
        """A of both side by side [E, H, 2r], B on a diagonal [E, 2r, 2I], with the scaling in it"""
        self.down = Factors(down_a.transpose(1, 2), down_b)
        """A [E, I, r], B [E, r, H]"""

    @property
    def nbytes(self) -> int:
        """Of its tensors."""
        return self.gate_up.nbytes + self.down.nbytes
