"""The default number of kt-kernel's sub-pools.

The workers of a sub-pool run on one NUMA node, so with a single sub-pool the cores of the other nodes stay idle.
"""

from __future__ import annotations

from pathlib import Path

from ...ground.machine import numa_nodes, usable_cores


def sub_pools(weights: str | Path | None = None, threads: int | None = None) -> int:
    """One per NUMA node that the process may use, or as many as packed weights are divided among, if there are nodes for them;
    never more than workers.

    Args:
        weights: directory of packed weights.
        threads: workers that were asked for; None for half the cores.
    """
    nodes = min(len(numa_nodes()), threads or max(1, usable_cores() // 2))
    divided = divided_among(Path(weights).expanduser()) if weights else None
    return divided if divided and divided <= nodes else nodes


def divided_among(weights: Path) -> int | None:
    """The number of sub-pools that packed weights were made for (``_layer_*/_numa_*``); None without such files."""
    layer = next(weights.glob("_layer_*"), None)
    return sum(1 for _ in layer.glob("_numa_*")) if layer is not None else None
