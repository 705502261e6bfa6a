"""kt-kernel's integers: the routed experts, packed by its own kernels.

A worker process packs the layers and is replaced from time to time: kt-kernel 0.7.2 never frees packed weights, so a single
process would end up with the whole model in memory.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import cache
from multiprocessing import get_context
from pathlib import Path

from ...checkpoint.discovery import formulas
from ...checkpoint.layout import CheckpointLayout
from ...checkpoint.opening import MoEModel, open_checkpoint
from ...engines.ktkernel.engine import KTEngine
from ...engines.ktkernel.methods import Method, PackedShape
from ...engines.ktkernel.packed_files import LayerRecord, check_written, expected_files, layer_directory, record_for
from ...ground.errors import KTKernelError, KTModelError
from ...ground.process import die_with_parent
from .parts import Part

_LEAK = 2 * 2**30
"""bytes of packed weights after which the worker process is replaced"""


@contextlib.contextmanager
def kt_layers(
    engine: type[KTEngine], moe: MoEModel, source: Path, target: Path, pools: int, threads: int | None
) -> Iterator[list[Part]]:
    """What to write for each layer.

    Args:
        pools: NUMA sub-pools that the weights are split into.
        threads: worker threads; None for the physical cores.

    Raises:
        KTModelError: The experts are none that kt-kernel computes.
        KTKernelError: While they are written: the worker process ended.
    """
    for formula in formulas(moe.experts):
        if problem := engine.cannot_compute(formula):
            raise KTModelError(f"kt-kernel cannot use packed experts of {source}: they are {formula}, and {problem}.")
    method = engine.method
    sizes = {module.layer: PackedShape.of(method, module.shape, pools).nbytes for module in moe.experts}
    tasks = max(1, _LEAK // max(sizes.values()))
    with ProcessPoolExecutor(1, get_context("spawn"), _begin, max_tasks_per_child=tasks) as pool:
        parts = []
        for module in moe.experts:
            record = record_for(module.shape, method, pools, moe.layout.layer(module.name).fingerprint())

            def write(directory: Path, record: LayerRecord = record, layer: int = module.layer) -> Iterable[Path]:
                try:
                    pool.submit(_pack_layer, source, layer, directory.parent, method, pools, threads).result()
                except BrokenProcessPool as error:
                    raise KTKernelError(
                        f"The process that packed layer {layer} of {source} was killed, most likely for memory; see what it printed "
                        "last. Layers that are complete stay: run it again, with more memory free."
                    ) from error
                check_written(directory, record, method)
                return directory.glob("_numa_*/*.kt")

            files = expected_files(record, method)
            parts.append(Part(layer_directory(target, module.layer), record, sizes[module.layer], write, files))
        yield parts


def _begin() -> None:
    """Let the worker die with its parent, and discard kt-kernel's output, some of which comes at exit."""
    die_with_parent()
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def _pack_layer(source: Path, layer: int, root: Path, method: Method, pools: int, threads: int | None) -> None:
    """Runs in the worker: kt-kernel writes ``root/_layer_{layer}/_numa_*/*.kt``."""
    import torch

    from ...checkpoint.expert_weights import LayerWeights
    from ...engines.ktkernel.pack import write_packed

    layout = _layout(source)
    module = next(module for module in layout.modules if module.layer == layer)
    size = method.padded(module.shape.hidden_size), method.padded(module.shape.intermediate_size, pools)
    experts = layout.layer(module.name).experts(torch.bfloat16)
    weights = LayerWeights.stacked(experts, module.shape, torch.bfloat16, size)
    write_packed(method, layer, module.num_experts_per_tok, weights, root, pools, threads)


@cache
def _layout(source: Path) -> CheckpointLayout:
    """Opened once per worker."""
    return open_checkpoint(source, quantized=True).layout
