"""Sub-pools of kt-kernel's workers: how many there are where no number is asked for.

The workers of a sub-pool all run on one NUMA node and share its cores, so with one sub-pool the other nodes' cores have none.
"""

from __future__ import annotations

from pathlib import Path

from ...ground.machine import numa_nodes, usable_cores


def sub_pools(weights: str | Path | None = None, threads: int | None = None) -> int:
    """One per NUMA node that the process may use, or as many as packed weights are divided among, where there are nodes for
    them; not more than workers.

    Args:
        weights: directory of packed weights.
        threads: workers that are asked for; None for half the cores, which a quota may make few.
    """
    nodes = min(len(numa_nodes()), threads or max(1, usable_cores() // 2))
    divided = divided_among(Path(weights).expanduser()) if weights else None
    return divided if divided and divided <= nodes else nodes


def divided_among(weights: Path) -> int | None:
    """The sub-pools for which packed weights were made (``_layer_*/_numa_*``); None where there are no such files."""
    layer = next(weights.glob("_layer_*"), None)
    return sum(1 for _ in layer.glob("_numa_*")) if layer is not None else None
