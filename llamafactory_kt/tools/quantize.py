"""Pack a model's routed experts once with kt-kernel, into files that later loads only read.

A worker process packs the layers and is replaced from time to time: kt-kernel 0.7.2 never frees packed weights, so a single
process would end up with the whole model in memory.
"""

from __future__ import annotations

import os
import shutil
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import cache
from multiprocessing import get_context
from pathlib import Path

from tqdm.auto import tqdm

from ..checkpoint.discovery import formulas
from ..checkpoint.layout import CheckpointLayout
from ..checkpoint.opening import open_checkpoint
from ..engines.ktkernel import PACKING
from ..engines.ktkernel.methods import Method, PackedShape
from ..engines.ktkernel.packed_files import (
    LayerRecord,
    check_written,
    layer_directory,
    missing_layers,
    read_record,
    record_for,
    write_record,
)
from ..engines.ktkernel.sub_pools import sub_pools
from ..ground.atomic_output import check_room, replacing, writing
from ..ground.errors import KTConfigError, KTKernelError, KTModelError
from ..ground.process import die_with_parent

_LEAK = 2 * 2**30
"""bytes of packed weights after which the worker process is replaced"""


@dataclass(frozen=True)
class QuantizeReport:
    """What :func:`quantize_model` wrote."""

    output: str
    method: str
    layers: int
    """layers that were packed"""
    kept: int
    """layers that existed already"""
    nbytes: int
    """bytes of the whole directory"""


def quantize_model(
    model_path: str | Path, output: str | Path, method: str = "int8", *, pools: int | None = None, threads: int | None = None
) -> QuantizeReport:  # fmt: skip
    """Write ``.kt`` files for ``kt_weight_path``, layer by layer.

    A layer's directory appears when it is complete, so the next run continues an interrupted one.

    Args:
        model_path: a local checkpoint directory in safetensors.
        output: directory of the files; complete layers in it are kept.
        method: ``int8`` or ``int4``.
        pools: NUMA sub-pools that the weights are split into, the ``kt_threadpool_count`` of later chats; None for one per
            NUMA node.
        threads: worker threads; None for the physical cores.

    Raises:
        KTConfigError: The method is unknown.
        KTPathError: The checkpoint does not exist.
        KTModelError: The checkpoint is not in safetensors or not a supported MoE model, the disk is too small, or the output
            holds layers of another model or method.
        KTKernelError: kt-kernel cannot run here, or its process ended.
        KTOutputError: The output could not be written. The layers that are complete stay.
    """
    if method not in PACKING:
        raise KTConfigError(f"--method: unknown value {method!r}, expected {' or '.join(PACKING)}.")
    engine = PACKING[method]
    if problem := engine.problem():
        raise KTKernelError(f"kt-kernel cannot pack {method} weights here: {problem}. A chat with them needs the same.")
    source, target, kind = Path(model_path), Path(output), engine.method
    layout, pools = open_checkpoint(source, quantized=True).layout, pools or sub_pools()
    for formula in formulas(layout.modules):
        if problem := engine.cannot_compute(formula):
            raise KTModelError(f"kt-kernel cannot use packed experts of {source}: they are {formula}, and {problem}.")
    records = {
        module.layer: record_for(module.shape, kind, pools, layout.layer(module.name).fingerprint())
        for module in layout.modules
    }
    _check_output(target, records)
    missing = set(missing_layers(target, records, kind))
    sizes = {m.layer: PackedShape.of(kind, m.shape, pools).nbytes for m in layout.modules if m.layer in missing}
    check_room(target, sum(sizes.values()))
    _pack_all(source, target, kind, pools, threads, sizes, records)
    total = sum(file.stat().st_size for file in target.rglob("*.kt"))
    return QuantizeReport(str(target), kind.name, len(sizes), len(records) - len(sizes), total)


def _pack_all(
    source: Path, target: Path, method: Method, pools: int, threads: int | None, sizes: dict[int, int],
    records: dict[int, LayerRecord],
) -> None:  # fmt: skip
    if not sizes:
        return
    tasks = max(1, _LEAK // max(sizes.values()))
    with (
        ProcessPoolExecutor(1, get_context("spawn"), _begin, max_tasks_per_child=tasks) as pool,
        tqdm(total=sum(sizes.values()), unit="B", unit_scale=True, unit_divisor=1024, desc="Quantizing") as bar,
    ):
        for number, (layer, size) in enumerate(sizes.items(), start=1):
            bar.set_postfix_str(f"layer {number} of {len(sizes)}", refresh=True)
            directory = layer_directory(target, layer)
            with writing(target):
                if directory.is_dir():
                    shutil.rmtree(
                        directory
                    )  # incomplete, or without our record: written by kt-kernel itself or another version
            with replacing(directory) as temporary:
                try:
                    pool.submit(_pack_layer, source, layer, temporary.parent, method, pools, threads).result()
                except BrokenProcessPool as error:
                    raise KTKernelError(
                        f"The process that packed layer {layer} of {source} was killed, most likely for memory; see what it printed "
                        "last. Layers that are complete stay: run it again, with more memory free."
                    ) from error
                check_written(temporary, records[layer], method)
                write_record(temporary, records[layer])
            bar.update(size)


def _begin() -> None:
    """Let the worker die with its parent, and discard kt-kernel's output, some of which comes at exit."""
    die_with_parent()
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def _pack_layer(source: Path, layer: int, root: Path, method: Method, pools: int, threads: int | None) -> None:
    """Runs in the worker: kt-kernel writes ``root/_layer_{layer}/_numa_*/*.kt``."""
    import torch

    from ..checkpoint.expert_weights import LayerWeights
    from ..engines.ktkernel.pack import write_packed

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


def _check_output(target: Path, records: dict[int, LayerRecord]) -> None:
    for layer, record in records.items():
        found = read_record(layer_directory(target, layer))
        if found is not None and found[0] != record:
            raise KTModelError(
                f"{layer_directory(target, layer)} holds another model's or another method's weights ({found[0].method}, "
                f"{found[0].pools} sub-pools, {found[0].num_experts} experts of {found[0].hidden_size} x "
                f"{found[0].intermediate_size}). Choose another output or remove it."
            )
