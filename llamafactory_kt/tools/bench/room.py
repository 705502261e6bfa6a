"""Do all configurations of a bench fit into memory together? Told by sizes alone, before anything is loaded."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from ...checkpoint.opening import weight_files
from ...engines.registry import AUTO, find_engine
from ...ground.errors import KTMemoryError
from ...ground.machine import available_memory, gib
from ...ground.tensor_files import SafetensorsStore
from .bandwidth import SIZE
from .rows import Row

PROCESS = 2**29
"""bytes that a process takes beside the weights: torch and transformers (0.3 GiB on Linux), buffers, a conversation"""


class Weights(NamedTuple):
    """Bytes of a checkpoint's tensors."""

    experts: int
    """routed ones"""
    others: int
    layer: int
    """the largest layer's experts, which a load holds beside the packed ones"""

    @property
    def total(self) -> int:
        """All tensors."""
        return self.experts + self.others

    @classmethod
    def of(cls, sizes: Mapping[str, int]) -> Weights:
        """Add up tensors, by their names in the checkpoint."""
        layers: Counter[str] = Counter()
        for name, size in sizes.items():
            before, experts, _ = name.partition(".experts.")
            layers[before if experts else ""] += size
        others = layers.pop("", 0)
        return cls(layers.total(), others, max(layers.values(), default=0))


def stored_weights(model: str) -> Weights | None:
    """The sizes of a local checkpoint, by its headers; None where there is none, as with a name on the hub."""
    files = weight_files(model)
    if not files:
        return None
    return Weights.of({name: info.nbytes for name, info in SafetensorsStore(files[0], files).infos.items()})


def need(row: Row, weights: Weights, gpu_memory: int) -> int:
    """Bytes of the CPU's memory that a row's weights take. What does not fit on the GPUs is there for stock, too."""
    if row.stock or not row.config.get("use_kt"):
        return max(0, weights.total - gpu_memory)
    others = 0 if gpu_memory else weights.others
    engine = find_engine(row.config.get("kt_backend", AUTO))
    bits = engine.bits if engine is not None and engine.bits is not None else 16
    return weights.experts * bits // 16 + others


def check_room(rows: Sequence[Row], weights: Weights, gpu_memory: int) -> dict[str, int]:
    """name -> bytes of each row, which are all in memory together.

    Args:
        gpu_memory: bytes of all GPUs, 0 without any.

    Raises:
        KTMemoryError: They are more than is free.
    """
    needs = {row.name: need(row, weights, gpu_memory) for row in rows}
    beside = SIZE + weights.layer + PROCESS * (len(rows) + 1)
    if (total := sum(needs.values()) + beside) > (free := available_memory()):
        each = ", ".join(f"{name} {gib(size)}" for name, size in needs.items())
        raise KTMemoryError(
            f"All configurations are in memory together, and take {gib(total)} ({each}, {gib(beside)} for their processes, the "
            f"layer being read, and to measure the memory itself); {gib(free)} are free. Measure fewer at once (--no-base, fewer "
            "--against), or a smaller model."
        )
    return needs


def warm_page_cache(model: str) -> int:
    """Read a local checkpoint once, so that every load finds it in the page cache; not where it would not fit there.

    Returns:
        Its bytes, 0 where there is no local one.
    """
    files = weight_files(model)
    total = sum(file.stat().st_size for file in files)
    if total < available_memory() // 2:
        for file in files:
            with file.open("rb", buffering=0) as handle:
                while handle.read(2**24):
                    pass
    return total
