"""kt-kernel in this process: is it there, its lock, its output, and the making of its objects."""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import gc
import os
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from ...checkpoint.reader import LayerWeights
from ...ground.errors import KTKernelError
from ...ground.machine import missing_cpu_flags, usable_cores
from ...ground.process import is_forked, require_own_process, wait
from .cpuinfer import settled_pool, worker_pool
from .methods import METHODS, Method

kernel_lock = threading.Lock()
"""Held around every call into the kernel: two threads must never be in it at once."""


def kernel_problem(method: str = "AMXBF16") -> str | None:
    """Why a method's kernel cannot run here, or None. Never raises."""
    lora = METHODS[method].lora
    if lora and (problem := _lacking("avx512_bf16")):  # told before kt-kernel is imported, which takes a while
        return problem
    try:
        with quiet_stdout():
            import kt_kernel
            from kt_kernel import kt_kernel_ext
            from kt_kernel.sft.amx import _SFT_METHOD_TO_CLASS
    except ImportError as error:
        return f"kt-kernel is not installed or does not load ({error}); pip install kt-kernel"
    variant, forced = kt_kernel.__cpu_variant__, os.environ.get("KT_KERNEL_CPU_VARIANT")
    because = f" (its variant is forced by KT_KERNEL_CPU_VARIANT={forced}; unset that)" if forced else ""
    if problem := _lacking(variant):  # a forced variant would kill the process with SIGILL
        return problem + because
    found = _SFT_METHOD_TO_CLASS.get(f"{method}_SFT") if lora else getattr(kt_kernel_ext.moe, f"{method}_MOE", None)
    return None if found is not None else f"kt-kernel's variant {variant!r} has no kernel for {method}{because}"


def _lacking(build: str) -> str | None:
    missing = missing_cpu_flags(build)
    return f"this CPU lacks {', '.join(missing)}, which kt-kernel's kernels need" if missing else None


def cpu_variant() -> str:
    """The instruction-set variant kt-kernel chose, for example ``avx512_bf16`` or ``amx``."""
    import kt_kernel

    return str(kt_kernel.__cpu_variant__)


@atexit.register
def _shut_down() -> None:
    """Wait for threads that were in the kernel, then let it say goodbye into the void: its destructor writes to stdout
    after Python's own is closed. In a forked child, it would wait for workers that the child does not have."""
    if "kt_kernel.sft.amx" not in sys.modules:
        return
    wait()
    with contextlib.suppress(Exception), quiet_stdout():
        from kt_kernel.sft.amx import AMXSFTMoEWrapper

        from .sft_kernel import every_wrapper, release_all

        if is_forked():
            for kept in (AMXSFTMoEWrapper._cpu_infer_instance, *every_wrapper()):
                ctypes.pythonapi.Py_IncRef(ctypes.py_object(kept))  # never destroyed
            return
        release_all()
        AMXSFTMoEWrapper._cpu_infer_instance = None
        gc.collect()


@contextlib.contextmanager
def quiet_stdout(quiet: bool = True) -> Iterator[None]:
    """Keep what C++ code writes to file descriptor 1 out of the terminal. Python's own output is flushed first."""
    if not quiet:
        yield
        return
    _flush()
    saved, void = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(void, 1)
        yield
    finally:
        _flush()  # C buffers what it prints into a pipe
        os.dup2(saved, 1)
        os.close(saved)
        os.close(void)


def _flush() -> None:
    """Write out Python's and C's buffers of stdout."""
    with contextlib.suppress(Exception):
        sys.stdout.flush()
        ctypes.CDLL(None).fflush(None)


def require_kernel(backend: str) -> None:
    """Raise KTKernelError unless the kernel can run here."""
    if problem := kernel_problem(backend):
        raise KTKernelError(
            f"kt_backend: {backend} cannot run here: {problem}. kt_backend: auto takes the fastest engine that can."
        )


def write_packed(
    method: Method,
    layer: int,
    num_experts_per_tok: int,
    weights: LayerWeights,
    root: Path,
    pools: int,
    threads: int | None,
) -> None:
    """Let kt-kernel pack one layer (gate, up, down in bf16, padded) into ``root/_layer_{layer}/_numa_*/*.kt``.

    The memory of the packed weights is not given back (kt-kernel 0.7.2).
    """
    from kt_kernel import kt_kernel_ext

    require_own_process()
    experts, intermediate, hidden = weights.gate.shape
    mask, every = torch.zeros(experts, dtype=torch.bool), torch.arange(experts)
    with kernel_lock, quiet_stdout():
        infer = worker_pool(max(pools, threads or usable_cores()), pools)
        config = kt_kernel_ext.moe.MOEConfig(experts, num_experts_per_tok, hidden, intermediate, mask.data_ptr())
        config.layer_idx, config.pool, config.max_len = layer, infer.backend_, 32
        config.save, config.load, config.path = True, False, str(root)
        config.gate_proj, config.up_proj, config.down_proj = (
            tensor.data_ptr() for tensor in (weights.gate, weights.up, weights.down)
        )
        moe = {"AMXINT8": kt_kernel_ext.moe.AMXInt8_MOE, "AMXINT4": kt_kernel_ext.moe.AMXInt4_MOE}[method.name](config)
        infer.submit(moe.load_weights_task(every.data_ptr()))
        infer.sync()


def make_base_moe(
    method: Method, layer: int, num_experts_per_tok: int, weights: LayerWeights, max_chunk: int
) -> tuple[Any, Any]:
    """Build one of kt-kernel's inference kernels; its Python wrappers need CUDA, the kernels do not.

    Args:
        weights: gate, up and down in bf16, padded; they are packed, and not needed afterwards.

    Returns:
        (the kernel object, what it points to and must be kept)
    """
    from kt_kernel import kt_kernel_ext

    experts, intermediate, hidden = weights.gate.shape
    on_gpu, every = torch.zeros(experts, dtype=torch.bool), torch.arange(experts)
    infer = worker_pool()
    config = kt_kernel_ext.moe.MOEConfig(experts, num_experts_per_tok, hidden, intermediate, on_gpu.data_ptr())
    config.layer_idx, config.pool, config.max_len = layer, infer.backend_, max_chunk
    config.gate_projs, config.up_projs, config.down_projs = (
        [[expert.data_ptr() for expert in tensor]] for tensor in (weights.gate, weights.up, weights.down)
    )
    config.gate_scales = config.up_scales = config.down_scales = []
    moe = getattr(kt_kernel_ext.moe, f"{method.name}_MOE")(config)
    infer.submit(moe.load_weights_task(every.data_ptr()))
    infer.sync()
    return moe, (infer, on_gpu, every)


def make_wrapper(**arguments: Any) -> Any:
    """Build a kt-kernel SFT wrapper (its constructor's keywords, see ``kt_kernel.KTMoEWrapper``)."""
    from kt_kernel import KTMoEWrapper

    worker_pool()  # which the wrapper then finds
    threads, pools = settled_pool()
    return KTMoEWrapper(
        mode="sft",
        gpu_experts_mask=None,
        cpuinfer_threads=threads,
        threadpool_count=pools,
        **arguments,
    )
