"""What is quantized, and how: by this package's kernels, or by kt-kernel."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from ...checkpoint.opening import open_checkpoint
from ...checkpoint.stored import StoredTensor
from ...engines.base import Engine
from ...engines.ktkernel import PACKING
from ...engines.ktkernel.engine import KTEngine
from ...engines.ktkernel.sub_pools import sub_pools
from ...engines.native.integers import INTEGERS, IntegerEngine
from ...engines.options import DENSE
from ...ground.errors import KTConfigError, KTKernelError
from .integers import dense_part, dense_weights, integer_layer
from .ktkernel import kt_layers
from .parts import check_output, complete

METHODS: dict[str, type[Engine]] = {engine.name.lower(): engine for engine in (*INTEGERS, *PACKING.values())}
"""``--method`` -> the engine that reads such files"""


@dataclass(frozen=True)
class QuantizeReport:
    """What :func:`quantize_model` wrote."""

    output: str
    method: str
    """the ``kt_backend`` that reads it"""
    layers: int
    """layers that were packed"""
    kept: int
    """layers that existed already"""
    dense: int
    """weights around the experts that the output has"""
    nbytes: int
    """bytes of the whole directory"""


def quantize_model(
    model_path: str | Path, output: str | Path, method: str = "int8", *, dense: str | None = None, pools: int | None = None,
    threads: int | None = None, overwrite: bool = False,
) -> QuantizeReport:  # fmt: skip
    """Write a directory for ``kt_weight_path``, layer by layer.

    A layer's directory appears when it is complete, so the next run continues an interrupted one.

    Args:
        model_path: a local checkpoint directory in safetensors.
        output: directory of the files; complete layers in it are kept.
        method: ``int8`` or ``int4``, this package's integers; ``amxint8`` or ``amxint4``, kt-kernel's. Any letter case.
        dense: with this package's, what ``kt_dense`` of later chats will be: ``int8``, ``int4``, or ``same`` for the experts alone; None for
            the method.
        pools: with kt-kernel's, NUMA sub-pools that the weights are split into, the ``kt_threadpool_count`` of later chats; None for one
            per NUMA node.
        threads: that quantize; None for the physical cores.
        overwrite: keep nothing of what an earlier run wrote, of whatever model and method.

    Raises:
        KTConfigError: An argument is unknown, or not one of the method's.
        KTPathError: The checkpoint does not exist.
        KTModelError: The checkpoint is not in safetensors or not a supported MoE model, a weight is not finite, the disk is too small, or
            the output holds layers of another model or method, or something else.
        KTKernelError: The kernels cannot run here, or kt-kernel's process ended.
        KTOutputError: The output could not be written. The layers that are complete stay.
    """
    engine = METHODS.get(method.lower())
    if engine is None:
        raise KTConfigError(f"--method: unknown value {method!r}, expected one of {', '.join(METHODS)}.")
    own = issubclass(engine, IntegerEngine)
    if dense is not None and dense.lower() not in DENSE:
        raise KTConfigError(f"--dense: unknown value {dense!r}, expected one of {', '.join(DENSE)}.")
    if dense is not None and not own:
        raise KTConfigError(f"--dense is for --method int8 and int4; kt-kernel's files ({method}) have experts alone.")
    if pools is not None and own:
        raise KTConfigError(
            f"--threadpool-count is for --method amxint8 and amxint4; {method} is not divided among NUMA nodes."
        )
    if problem := engine.problem():
        raise KTKernelError(f"{engine.name} cannot pack weights here: {problem}. A chat with them needs the same.")
    target = Path(output)
    check_output(target)
    opened = open_checkpoint(model_path, quantized=True)
    around: list[StoredTensor] = []
    if issubclass(engine, IntegerEngine):
        layers = parts = [integer_layer(engine, opened.layout.layer(module.name), target) for module in opened.experts]
        if bits := DENSE[dense.lower()] if dense is not None else engine.bits:
            around = dense_weights(opened)
            parts = [*layers, dense_part(around, target, bits)]
        with _threads_of_torch(threads):
            made = complete(target, parts, overwrite=overwrite)
    else:
        assert issubclass(engine, KTEngine)
        with kt_layers(engine, opened, Path(model_path), target, pools or sub_pools(), threads) as layers:
            made = complete(target, layers, overwrite=overwrite)
    written = sum(part in made for part in layers)
    total = sum(file.stat().st_size for file in target.rglob("*") if file.is_file())
    return QuantizeReport(str(target), engine.name, written, len(layers) - written, len(around), total)


@contextlib.contextmanager
def _threads_of_torch(number: int | None) -> Iterator[None]:
    """The native kernels take as many; None: as they are."""
    before = torch.get_num_threads()
    torch.set_num_threads(number or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
