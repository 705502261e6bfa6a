"""What this machine does in a second: how fast it reads memory and multiplies, and how fast the native kernels do so for each kind of weight.

It takes seconds, and is kept for later estimates."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from ...ground.machine import cpu_name, usable_cores
from ...ground.measurements import BUSY, Remembered, load_of_cores
from ...ground.paging import empty_in_huge_pages
from ...native.fused_linear import FusedLinear
from ...native.library import library
from ...native.packed import PackedWeight, Packing
from ...native.quantized_tensor import QuantizedTensor
from ..bench.processes import worker
from ..bench.speed import BANDWIDTH_BUFFER, Speed, median_seconds, serve_speed
from .weights import PLAIN

logger = logging.getLogger(__name__)

_WIDTH = 2048
"""inner size of the products"""
_READ = 256 * 2**20
"""bytes of weights that one row is multiplied with: more than most caches hold"""
_ROWS = 64
"""rows of a prompt: what an expert gets of 1024 tokens that choose 8 of 128"""
_TIMES = 3
"""measurements of each, of which the best counts"""
_MULTIPLIED = 2048
"""outputs of the product with these"""


@dataclass(frozen=True)
class MachineSpeed:
    """Of all cores that this process may use. Each is the best of a few measurements: others may use the machine, too."""

    cpu: str
    cores: int
    reads: float
    """memory bandwidth, bytes per second, by torch's sum (:func:`~..bench.speed.serve_speed`)"""
    products: float
    """rate of torch's large product, operations per second"""
    kernels: Mapping[int, Speed]
    """bits of a weight -> what the native kernels reach; none where they do not run"""
    load: float = 0.0
    """tasks for each core that ran or waited before it was measured"""

    @property
    def was_busy(self) -> bool:
        """Whether other programs had their part of these figures."""
        return self.load > BUSY

    def of(self, bits: int) -> Speed:
        """With weights of so many bits."""
        return self.kernels.get(bits, Speed(self.reads, self.products))


def machine_speed(measure_again: bool = False) -> MachineSpeed:
    """Measure this machine, or recall what was measured.

    Raises:
        KTError: The measuring process ended, for lack of memory as a rule.
    """
    found = library()
    build = found if isinstance(found, str) else found.kt_in_use().decode()
    memory = Remembered({"speed": [BANDWIDTH_BUFFER, _READ, _WIDTH, _ROWS, _MULTIPLIED], "kernels": build})
    if measure_again:
        memory.forget()
    measured, load = memory.recall(_read), load_of_cores()
    if measured is None or (measured.was_busy and load <= BUSY):
        logger.info("Measuring this machine, once; it takes some seconds ...")
        measured = replace(_measure(), load=load)
        memory.keep(asdict(measured))
    return measured


def _measure() -> MachineSpeed:
    cores = usable_cores()
    with worker("the machine's speed", serve_speed, cores) as (_, ask):
        asked: list[Speed] = [ask() for _ in range(_TIMES)]
    kernels: dict[int, Speed] = {}
    if not isinstance(library(), str):
        before = torch.get_num_threads()
        torch.set_num_threads(cores)
        try:
            kernels = {bits: _of_kernels(bits) for bits in (PLAIN, 8, 4)}
        finally:
            torch.set_num_threads(before)
    reads, products = (max(getattr(speed, kind) for speed in asked) for kind in ("reads", "products"))
    return MachineSpeed(cpu_name(), cores, reads, products, kernels)


def _of_kernels(bits: int) -> Speed:
    rows = _READ * 8 // (bits * _WIDTH)
    large, small = FusedLinear(_weight(rows, bits)), FusedLinear(_weight(_MULTIPLIED, bits))
    with torch.inference_mode():
        one, many = (torch.ones(count, _WIDTH, dtype=torch.bfloat16) for count in (1, _ROWS))
        reading, computing = (
            min(median_seconds(call, x) for _ in range(_TIMES)) for call, x in ((large, one), (small, many))
        )
    return Speed(_nbytes(rows, bits) / reading, 2 * _ROWS * _WIDTH * _MULTIPLIED / computing)


def _weight(rows: int, bits: int) -> torch.Tensor:
    """[rows, width], of any values."""
    if bits == PLAIN:
        return empty_in_huge_pages((rows, _WIDTH), torch.bfloat16).fill_(1)
    packing = Packing(f"int{bits}")
    codes = empty_in_huge_pages((rows, _WIDTH * bits // 8), torch.uint8).fill_(0x11)
    scales = empty_in_huge_pages((rows, _WIDTH // packing.group), torch.bfloat16).fill_(1)
    return QuantizedTensor(PackedWeight(packing, codes, scales), torch.bfloat16)


def _nbytes(rows: int, bits: int) -> int:
    return 2 * rows * _WIDTH if bits == PLAIN else Packing(f"int{bits}").nbytes(rows, _WIDTH)


def _read(found: Any) -> MachineSpeed:
    """What was kept, where it makes sense; else ValueError, or what reading it raises."""
    kernels = {int(bits): Speed(**speed) for bits, speed in found["kernels"].items()}
    speed = MachineSpeed(**{**found, "kernels": kernels})
    if not all(0 < rate < math.inf for one in (speed.of(0), *kernels.values()) for rate in (one.reads, one.products)):
        raise ValueError("not the speed of a machine")
    float(speed.load)
    return speed
