"""Where bfloat16 weights are read fastest: packed or plain, in large pages.

Packed are weights in oneDNN's layout where it has bfloat16 kernels, and in columns (:mod:`.columns`) where it has none.
Its layout saves oneDNN from reading plain weights row by row. With AVX-512 it was faster for every size that was tried;
with AMX it took from 0.8 to 1.5 times as long as the plain product, depending on the size. Without AVX-512, columns were
faster for all but the smallest. So it is measured.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from math import prod
from statistics import median
from time import perf_counter

import torch

from ..ground.measurements import Remembered
from ..ground.paging import in_large_pages
from . import column_tiles as columns
from .linear import has_bfloat16_kernels, linear
from .mkldnn_blob import OneDNNPlaces

Size = tuple[int, int]
"""(out, in) of a weight"""

SMALLEST = 2**20
"""bytes of a weight; smaller ones are in the CPU's cache, and calling is what they cost"""

_COLUMNS = 1.05
"""what a token may take in columns of the time with the plain weight: two to thirty rows, as an expert has of a prompt, take
two thirds to nine tenths of it"""
_TURNS = 9
_known: dict[tuple[int, Size], float] = {}
"""what was measured or recalled in this process, with so many threads: the time with packed weights over that with plain"""


def size_of(weight: torch.Tensor) -> Size:
    """(out, in)."""
    rows, columns = weight.shape
    return rows, columns


def fits(size: Size) -> bool:
    """Whether a weight of that size can be packed."""
    return has_bfloat16_kernels() or size[0] % columns.WIDTH == 0


def is_packed(weight: torch.Tensor) -> bool:
    """Whether a weight that :func:`placing` has placed is. In oneDNN's layout it has its shape and type, and no address."""
    return weight.dim() == 3 or weight.layout != torch.strided


def unpack(weight: torch.Tensor) -> torch.Tensor:
    """The plain weight [out, in]."""
    return columns.restore(weight) if weight.dim() == 3 else weight.to_dense()


def placing(size: Size, count: int, packed: bool) -> Callable[..., torch.Tensor]:
    """Where weights of a size go for good.

    Args:
        count: how many there will be; they share one block of memory.

    Returns:
        A call (number of the weight, its rows in one tensor or several, [..., in] each) -> the weight in its place.
    """

    if packed and has_bfloat16_kernels():
        return OneDNNPlaces(size, count)
    shape = columns.layout(size) if packed else size
    block = in_large_pages(torch.empty(count, *shape, dtype=torch.bfloat16, device="cpu"))
    if packed:
        return lambda number, *rows: columns.store(block[number], rows)
    return lambda number, *rows: torch.cat(rows, out=block[number])


@torch.inference_mode()
def faster_packed(sizes: Collection[Size], sample: Callable[[], Mapping[Size, Sequence[torch.Tensor]]]) -> set[Size]:
    """The sizes of weights whose product with one row, as in a chat's answers, is faster with packed weights.

    Each size is measured once on a machine, in turn with the others, so that weights come from memory and not from the
    CPU's cache. Small ones are counted in without measuring, which would show little but noise; in columns they would cost
    more calls, and are not.

    Args:
        sample: called where one of them has yet to be measured: plain weights in bfloat16 by their size; the more there are,
            the surer the cache holds none.
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
    # by their layout, which ONEDNN_MAX_CPU_ISA may have otherwise the next time
    layout = "oneDNN's in large pages" if has_bfloat16_kernels() else "columns"
    return Remembered({"packed over plain": "threads, out, in, ratio of times", "layout": layout})


def _recalled() -> dict[tuple[int, Size], float]:
    try:
        return {(int(n), (int(out), int(width))): float(ratio) for n, out, width, ratio in _memory().recall()}
    except (TypeError, ValueError):
        return {}


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
