"""The layout in which a bfloat16 weight is read fastest: packed or plain, in huge pages.

Packed means oneDNN's layout where it has bfloat16 kernels, and column tiles (:mod:`.column_tiles`) where it has none. Which layout is
faster depends on the CPU and, with AMX, on the size; so each size is measured once.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from math import prod
from statistics import median
from time import perf_counter
from typing import Any

import torch

from ..ground.measurements import Remembered
from ..ground.paging import in_huge_pages
from . import column_tiles as columns
from .linear import linear
from .mkldnn_blob import OneDNNPlaces
from .mkldnn_ops import has_bfloat16_kernels

Size = tuple[int, int]
"""(out, in) of a weight"""

SMALLEST = 2**20
"""bytes of a weight; smaller ones lie in the CPU's cache, and the call dominates"""

_COLUMNS = 1.05
"""column tiles may take this many times as long for one row, since they are faster for the two to thirty rows that an expert gets
of a prompt"""
_TURNS = 9
_known: dict[tuple[int, Size], float] = {}
"""(threads, size) -> time with packed over time with plain weights, measured or recalled in this process"""


def size_of(weight: torch.Tensor) -> Size:
    """(out, in)."""
    rows, columns = weight.shape
    return rows, columns


def fits(size: Size) -> bool:
    """Whether a weight of this size can be packed."""
    return has_bfloat16_kernels() or size[0] % columns.WIDTH == 0


def is_packed(weight: torch.Tensor) -> bool:
    """Whether a weight from :func:`placing` is packed. In oneDNN's layout it has its shape and dtype, but no address."""
    return weight.dim() == 3 or weight.layout != torch.strided


def unpack(weight: torch.Tensor) -> torch.Tensor:
    """The plain weight [out, in]."""
    return columns.restore(weight) if weight.dim() == 3 else weight.to_dense()


def placing(size: Size, count: int, packed: bool) -> Callable[..., torch.Tensor]:
    """Memory for ``count`` weights of one size, in one block.

    Returns:
        A call (index of the weight, its rows in one tensor or several, [..., in] each) -> the weight in its place.
    """

    if packed and has_bfloat16_kernels():
        return OneDNNPlaces(size, count)
    shape = columns.layout(size) if packed else size
    block = in_huge_pages(torch.empty(count, *shape, dtype=torch.bfloat16, device="cpu"))
    if packed:
        return lambda number, *rows: columns.store(block[number], rows)
    return lambda number, *rows: torch.cat(rows, out=block[number])


@torch.inference_mode()
def faster_packed(sizes: Collection[Size], sample: Callable[[], Mapping[Size, Sequence[torch.Tensor]]]) -> set[Size]:
    """The sizes for which packed weights are faster to multiply with one row, as in decoding.

    Each size is measured once on a machine, in turn with the others, so that weights come from memory and not from the CPU's cache.
    Small ones are not measured, which would show little but noise: they count as faster in oneDNN's layout, and not in column tiles,
    which would cost more calls.

    Args:
        sample: called if a size has yet to be measured: size -> plain bfloat16 weights. The more, the less the cache can hold.
    """
    small = {size for size in sizes if 2 * prod(size) < SMALLEST}
    large = {size: (torch.get_num_threads(), size) for size in set(filter(fits, sizes)) - small}
    if any(key not in _known for key in large.values()):
        _known.update(_recalled())
    if unknown := {size for size, key in large.items() if key not in _known}:
        samples = sample()
        found = _measure({size: samples[size] for size in unknown})
        _known.update({large[size]: ratio for size, ratio in found.items()})
        _memory().keep([[threads, *size, ratio] for (threads, size), ratio in _known.items()])
    if has_bfloat16_kernels():
        return small | {size for size, key in large.items() if _known[key] < 1}
    return {size for size, key in large.items() if _known[key] < _COLUMNS}


def forget_measured() -> None:
    """Have the next load measure again."""
    _known.clear()
    _memory().forget()


def _memory() -> Remembered:
    # by layout: ONEDNN_MAX_CPU_ISA may change it the next time
    layout = "oneDNN's in large pages" if has_bfloat16_kernels() else "columns"
    return Remembered({"packed over plain": "threads, out, in, ratio of times", "layout": layout})


def _recalled() -> dict[tuple[int, Size], float]:
    def read(measured: Any) -> dict[tuple[int, Size], float]:
        return {(int(n), (int(out), int(width))): float(ratio) for n, out, width, ratio in measured}

    return _memory().recall(read) or {}


def _measure(samples: Mapping[Size, Sequence[torch.Tensor]]) -> dict[Size, float]:
    def placed(packed: bool) -> dict[Size, list[torch.Tensor]]:
        places = {size: placing(size, len(weights), packed) for size, weights in samples.items()}
        return {size: [places[size](n, weight) for n, weight in enumerate(samples[size])] for size in samples}

    packed, plain = placed(True), placed(False)
    ratios: dict[Size, list[float]] = {size: [] for size in samples}
    for turn in range(_TURNS + 1):
        for size, found in ratios.items():
            x = torch.ones(1, size[1], dtype=torch.bfloat16)
            for one, other in zip(packed[size], plain[size], strict=True):
                ratio = _seconds(linear, x, one) / _seconds(linear, x, other)
                if turn:  # in the first one, kernels are compiled
                    found.append(ratio)
    return {size: median(found) for size, found in ratios.items()}


def _seconds(product: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], x: torch.Tensor, w: torch.Tensor) -> float:
    start = perf_counter()
    product(x, w)
    return perf_counter() - start
