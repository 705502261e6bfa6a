"""Packing a model's routed experts once, in kt-kernel's own kernels, into files that later loads only read.

The work is done in a process of its own, which is replaced from time to time: kt-kernel 0.7.2 never gives the memory of
packed weights back, and a large model would end up in memory as a whole.
"""

from __future__ import annotations

import os
import shutil
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache
from multiprocessing import get_context
from pathlib import Path

from tqdm.auto import tqdm

from ..checkpoint.layout import CheckpointLayout
from ..checkpoint.opening import open_checkpoint
from ..engines.ktkernel import PACKING
from ..engines.ktkernel.methods import Method, PackedShape
from ..engines.ktkernel.packed_files import LayerRecord, layer_directory, missing_layers, record_for, write_record
from ..engines.ktkernel.sub_pools import sub_pools
from ..ground.atomic_output import replacing
from ..ground.errors import KTConfigError, KTKernelError, KTModelError
from ..ground.process import die_with_parent

_LEAK = 2 * 2**30
"""bytes of packed weights after which the working process is replaced"""


@dataclass(frozen=True)
class QuantizeReport:
    """What :func:`quantize_model` wrote."""

    output: str
    method: str
    layers: int
    """layers packed now"""
    kept: int
    """layers that were there already"""
    nbytes: int
    """bytes of the whole directory"""


def quantize_model(
    model_path: str | Path,
    output: str | Path,
    method: str = "int8",
    *,
    pools: int | None = None,
    threads: int | None = None,
) -> QuantizeReport:
    """Write ``.kt`` files for ``kt_weight_path``, layer by layer.

    A layer's directory appears when it is complete, so an interrupted run is continued by the next.

    Args:
        model_path: a local checkpoint directory in safetensors.
        output: directory of the files; what is complete in it already is kept.
        method: ``int8`` or ``int4``.
        pools: NUMA sub-pools the weights are divided into (``kt_threadpool_count`` of the chats to come); None for one per NUMA
            node.
        threads: worker threads; None for the physical cores.

    Raises:
        KTConfigError: The method is unknown.
        KTPathError: The checkpoint does not exist.
        KTModelError: It is not in safetensors, is not a MoE model that is supported, or the disk is too small; the output
            holds layers of another model or method.
        KTKernelError: kt-kernel cannot run here.
    """
    if method not in PACKING:
        raise KTConfigError(f"--method: unknown value {method!r}, expected {' or '.join(PACKING)}.")
    engine = PACKING[method]
    if problem := engine.problem():
        raise KTKernelError(f"kt-kernel cannot pack {method} weights here: {problem}. A chat with them needs the same.")
    source, target, kind = Path(model_path), Path(output), engine.method
    layout, pools = open_checkpoint(source, fp8=True).layout, pools or sub_pools()
    records = {
        module.layer: record_for(module.shape, kind, pools, layout.layer(module.name).fingerprint())
        for module in layout.modules
    }
    _check_output(target, records)
    missing = list(missing_layers(target, records))
    sizes = {module.layer: PackedShape.of(kind, module.shape, pools).nbytes for module in layout.modules}
    _check_disk(target, sum(sizes[layer] for layer in missing))
    _pack_all(source, target, kind, pools, threads, {layer: sizes[layer] for layer in missing}, records)
    total = sum(file.stat().st_size for file in target.rglob("*.kt"))
    return QuantizeReport(str(target), kind.name, len(missing), len(records) - len(missing), total)


def _pack_all(
    source: Path, target: Path, method: Method, pools: int, threads: int | None, sizes: dict[int, int],
    records: dict[int, LayerRecord],
) -> None:  # fmt: skip
    if not sizes:
        return
    target.mkdir(parents=True, exist_ok=True)
    for unfinished in target.glob("._layer_*"):
        shutil.rmtree(unfinished)  # of a run that was killed
    tasks = max(1, _LEAK // max(sizes.values()))
    with (
        ProcessPoolExecutor(1, get_context("spawn"), _begin, max_tasks_per_child=tasks) as pool,
        tqdm(total=sum(sizes.values()), unit="B", unit_scale=True, unit_divisor=1024, desc="Quantising") as bar,
    ):
        for number, (layer, size) in enumerate(sizes.items(), start=1):
            bar.set_postfix_str(f"layer {number} of {len(sizes)}", refresh=True)
            directory = layer_directory(target, layer)
            if directory.is_dir():
                shutil.rmtree(directory)  # kt-kernel's own, or another version's: it has no record like ours
            with replacing(directory) as temporary:
                pool.submit(_pack_layer, source, layer, temporary.parent, method, pools, threads).result()
                write_record(temporary, records[layer])
            bar.update(size)


def _begin() -> None:
    """The working process dies with the one that waits for it, however that ends, and keeps kt-kernel's output, some
    of which comes at its very end, out of the terminal."""
    die_with_parent()
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def _pack_layer(source: Path, layer: int, root: Path, method: Method, pools: int, threads: int | None) -> None:
    """Runs in the working process: kt-kernel writes ``root/_layer_{layer}/_numa_*/*.kt``."""
    import torch

    from ..checkpoint.reader import LayerWeights
    from ..engines.ktkernel.pack import write_packed

    layout = _layout(source)
    module = next(module for module in layout.modules if module.layer == layer)
    size = method.padded(module.shape.hidden_size), method.padded(module.shape.intermediate_size, pools)
    experts = layout.layer(module.name).experts(torch.bfloat16)
    weights = LayerWeights.stacked(experts, module.shape, torch.bfloat16, size)
    write_packed(method, layer, module.num_experts_per_tok, weights, root, pools, threads)


@cache
def _layout(source: Path) -> CheckpointLayout:
    """Once in a working process."""
    return open_checkpoint(source, fp8=True).layout


def _check_output(target: Path, records: dict[int, LayerRecord]) -> None:
    from ..engines.ktkernel.packed_files import read_record

    for layer, record in records.items():
        found = read_record(layer_directory(target, layer))
        if found is not None and found[0] != record:
            raise KTModelError(
                f"{layer_directory(target, layer)} holds another model's or another method's weights ({found[0].method}, "
                f"{found[0].pools} sub-pools, {found[0].num_experts} experts of {found[0].hidden_size} x "
                f"{found[0].intermediate_size}). Choose another output or remove it."
            )


def _check_disk(target: Path, needed: int) -> None:
    from ..ground.machine import gib

    there = next(path for path in (target, *target.absolute().parents) if path.is_dir())
    free = shutil.disk_usage(there).free
    if needed > free:
        raise KTModelError(f"{target} needs {gib(needed)} and {gib(free)} are free there; choose another output.")
