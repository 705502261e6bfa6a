"""Do all configurations of a bench fit into memory together? Told by sizes alone, before anything is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..adapters.store import SafetensorsStore
from ..backends import canonical_backend
from ..errors import KTMemoryError
from ..experts.checkpoint import weight_files
from ..experts.methods import METHODS
from ..machine import available_memory, gib
from .bandwidth import SIZE
from .rows import Row

Weights = tuple[int, int]
"""(bytes of routed experts, bytes of all other weights)"""


def stored_weights(model: str) -> Weights | None:
    """The sizes of a local checkpoint, by its headers; None where there is none, as with a name on the hub."""
    files = weight_files(Path(model).expanduser())
    if not files:
        return None
    infos = SafetensorsStore(files[0], files).infos
    experts = sum(info.nbytes for name, info in infos.items() if ".experts." in name)
    return experts, sum(info.nbytes for info in infos.values()) - experts


def need(row: Row, weights: Weights, on_gpu: bool) -> int:
    """Bytes of the CPU's memory that a row's weights take."""
    experts, others = weights
    if row.stock or not row.config.get("use_kt"):
        return 0 if on_gpu else experts + others
    method = METHODS.get(canonical_backend(row.config.get("kt_backend", "auto")))
    return experts * (method.bits if method else 16) // 16 + (0 if on_gpu else others)


def check_room(rows: Sequence[Row], weights: Weights, on_gpu: bool) -> dict[str, int]:
    """name -> bytes of each row, which are all in memory together.

    Raises:
        KTMemoryError: They are more than is free.
    """
    needs = {row.name: need(row, weights, on_gpu) for row in rows}
    if (total := sum(needs.values()) + SIZE) > (free := available_memory()):
        each = ", ".join(f"{name} {gib(size)}" for name, size in needs.items())
        raise KTMemoryError(
            f"All configurations are in memory together, and their weights take {gib(total)} ({each}, {gib(SIZE)} to measure "
            f"the memory itself); {gib(free)} are free. Measure fewer at once (--no-base, fewer --against), or a smaller model."
        )
    return needs


def warm_page_cache(model: str) -> int:
    """Read a local checkpoint once, so that every load finds it in the page cache; not where it would not fit there.

    Returns:
        Its bytes, 0 where there is no local one.
    """
    files = weight_files(Path(model).expanduser())
    total = sum(file.stat().st_size for file in files)
    if total < available_memory() // 2:
        for file in files:
            with file.open("rb", buffering=0) as handle:
                while handle.read(2**24):
                    pass
    return total
