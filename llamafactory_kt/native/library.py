"""The library of native kernels, called through ctypes.

It is built when the package is installed. Where it is missing, or the CPU has none of its instruction sets, :func:`library` says why.
"""

from __future__ import annotations

import ctypes
import os
from ctypes import CDLL, POINTER, Structure, byref, c_char_p, c_double, c_float, c_int, c_int32, c_int64, c_void_p
from functools import cache

import torch

from .build import LIBRARY, NOT_BUILT, fingerprint, unsupported
from .openmp import pytorch_openmp

VARIABLE = "LLAMAFACTORY_KT_ISA"
"""chooses an instruction set instead of the fastest; ``none``: as on a CPU that has none"""
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


PANEL = 16
"""rows of a panel of LoRA's B"""


def in_panels(b: torch.Tensor) -> torch.Tensor:
    """LoRA's B [..., out, r] as the kernels read it, [..., out / 16, r, 16] of float32: in a vector's lanes are the rows."""
    rows, rank = b.shape[-2:]
    padded = b.new_zeros(*b.shape[:-2], -(-rows // PANEL) * PANEL, rank, dtype=torch.float32)
    padded[..., :rows, :] = b
    panels: torch.Tensor = padded.unflatten(-2, (-1, PANEL))  # type: ignore[no-untyped-call]
    return panels.transpose(-1, -2).contiguous()


def from_panels(panels: torch.Tensor, rows: int) -> torch.Tensor:
    """What :func:`in_panels` was given, in float32: [..., out / 16, r, 16] -> [..., rows, r]."""
    return panels.transpose(-1, -2).flatten(-3, -2)[..., :rows, :]


class Weight(Structure):
    """``kt_weight``."""

    _fields_ = (
        ("weight", c_void_p), ("stride", c_int64), ("a", c_void_p), ("b", c_void_p), ("bias", c_void_p), ("scales", c_void_p),
        ("scale_stride", c_int64), ("offsets", c_void_p),
    )  # fmt: skip


class PackingCall(Structure):
    """``kt_packing``."""

    _fields_ = (("group", c_int64), ("rows_of_scale", c_int64), ("scale_dtype", c_int32), ("table", c_float * 16))


class QuantizationCall(Structure):
    """``kt_quantization``."""

    _fields_ = (
        ("rows", c_int64), ("cols", c_int64), ("weight", c_void_p), ("stride", c_int64), ("dtype", c_int32), ("bits", c_int32),
        ("codes", c_void_p), ("scales", c_void_p),
    )  # fmt: skip


class ExpertsCall(Structure):
    """``kt_experts``."""

    _fields_ = (
        ("experts", c_int64), ("hidden", c_int64), ("intermediate", c_int64), ("rank", c_int64), ("dtype", c_int32),
        ("activation", c_int32), ("limit_activated", c_int32), ("alpha", c_float), ("limit", c_float), ("up_offset", c_float),
        ("packing", POINTER(PackingCall)), ("gate", POINTER(Weight)), ("up", POINTER(Weight)), ("down", POINTER(Weight)),
    )  # fmt: skip


class LinearCall(Structure):
    """``kt_linear``."""

    _fields_ = (
        ("rows", c_int64), ("cols", c_int64), ("rank", c_int64), ("dtype", c_int32), ("packing", POINTER(PackingCall)), ("weight", Weight),
    )  # fmt: skip


MOST_LINEARS = 8


class LinearsCall(Structure):
    """``kt_linears``."""

    _fields_ = (("count", c_int64), ("parts", POINTER(LinearCall) * MOST_LINEARS), ("outs", c_void_p * MOST_LINEARS))


class HeadsCall(Structure):
    """``kt_heads``."""

    _fields_ = (
        ("heads", c_int64), ("rows", c_int64), ("cols", c_int64), ("rank", c_int64), ("dtype", c_int32), ("transposed", c_int32),
        ("weight", c_void_p), ("head_stride", c_int64), ("stride", c_int64), ("a", c_void_p), ("b", c_void_p),
    )  # fmt: skip


class NormCall(Structure):
    """``kt_norm``."""

    _fields_ = (
        ("width", c_int64), ("weight", c_void_p), ("dtype", c_int32), ("eps", c_float), ("offset", c_float), ("round_first", c_int32),
    )  # fmt: skip


class AttentionCall(Structure):
    """``kt_attention``."""

    _fields_ = (
        ("batch", c_int64), ("heads", c_int64), ("kv_heads", c_int64), ("queries", c_int64), ("keys", c_int64), ("key_dim", c_int64),
        ("value_dim", c_int64), ("dtype", c_int32), ("coded", c_int32), ("scale", c_float), ("window", c_int64), ("q", c_void_p), ("k", c_void_p),
        ("v", c_void_p), ("q_strides", c_int64 * 3), ("k_strides", c_int64 * 3), ("v_strides", c_int64 * 3), ("sinks", c_void_p),
        ("mask", c_void_p), ("out", c_void_p),
    )  # fmt: skip


class Step(Structure):
    """``kt_step``."""

    _fields_ = (
        ("op", c_int32), ("dtypes", c_int32 * 3), ("sizes", c_int64 * 4), ("strides", (c_int64 * 4) * 3), ("out", c_void_p),
        ("a", c_void_p), ("b", c_void_p), ("c", c_void_p), ("alpha", c_double), ("beta", c_double), ("n", c_int64), ("call", c_void_p),
    )  # fmt: skip


STEPS = {name: number for number, name in enumerate((
    "copy", "add", "mul", "div", "rsub", "silu", "sigmoid", "gelu", "gelu_tanh", "exp", "clamp", "neg", "square", "rsqrt", "sqrt", "not",
    "fill_where", "sum", "softmax", "topk", "gather", "scatter", "fill", "complex_mul", "memcpy", "linear", "experts", "attention", "norm", "heads", "encode",
))}  # fmt: skip
"""``kt_op``, by name"""


@cache
def library() -> CDLL | str:
    """The library, ready to be called, or why it cannot be."""
    if not LIBRARY.is_file():
        reason = unsupported() or "install the package again"
        if not unsupported() and NOT_BUILT.is_file():
            reason = f"{NOT_BUILT.read_text()}; install g++ or clang++, then the package again"
        return f"the native kernels were not built with the package: {reason}"
    try:
        found = CDLL(str(LIBRARY))
    except OSError as error:
        return f"the native kernels do not load: {error}"
    if not _is_of_these_sources(found):
        return "the native kernels were built from other sources than those that are here; install the package again"
    found.kt_instruction_sets.restype = found.kt_in_use.restype = c_char_p
    found.kt_experts_scratch.restype = found.kt_linear_scratch.restype = found.kt_attention_scratch.restype = c_int64
    found.kt_experts_scratch.argtypes = [POINTER(ExpertsCall), c_int64, c_int64, c_int]
    found.kt_linear_scratch.argtypes = [POINTER(LinearCall), c_int64, c_int]
    found.kt_experts_forward.argtypes = [
        POINTER(ExpertsCall), c_void_p, c_int32, c_int64, c_void_p, c_void_p, c_int64, c_void_p, c_void_p, c_int,
    ]  # fmt: skip
    found.kt_linear_forward.argtypes = [POINTER(LinearCall), c_void_p, c_int32, c_int64, c_void_p, c_void_p, c_int]
    found.kt_heads_scratch.argtypes, found.kt_heads_scratch.restype = [POINTER(HeadsCall), c_int64, c_int], c_int64
    found.kt_heads_forward.argtypes = [
        POINTER(HeadsCall), c_void_p, c_int32, c_int64, c_void_p, c_void_p, c_int,
    ]  # fmt: skip
    found.kt_heads_forward.restype = None
    found.kt_attention_scratch.argtypes = [POINTER(AttentionCall), c_int]
    found.kt_attention_forward.argtypes = [POINTER(AttentionCall), c_void_p, c_int]
    found.kt_run_scratch.argtypes, found.kt_run_scratch.restype = [POINTER(Step), c_int64, c_int], c_int64
    found.kt_run.argtypes = [POINTER(Step), c_int64, c_void_p, c_int, c_void_p]
    found.kt_quantize.argtypes = [POINTER(QuantizationCall), c_int]
    found.kt_norm_forward.argtypes = [POINTER(NormCall), c_void_p, c_int32, c_int64, c_void_p, c_int]
    found.kt_norm_forward.restype = None
    found.kt_linear_forward.restype = found.kt_attention_forward.restype = None
    found.kt_guard_mapped.argtypes, found.kt_release_mapped.argtypes = [c_void_p, c_int64], [c_void_p]
    wanted = os.environ.get(VARIABLE)
    sets = found.kt_instruction_sets().decode() if wanted != "none" else ""
    if not sets:
        return (
            f"{VARIABLE} is none" if wanted == "none" else "the CPU has none of AVX2 with FMA, AVX-512 and AVX-512 BF16"
        )
    if found.kt_use(wanted.encode() if wanted else None):
        return f"{VARIABLE} is {wanted!r}; unset it, or set one that this CPU has: {sets.replace(',', ', ')}"
    _join_team(found)
    return found


def _is_of_these_sources(found: CDLL) -> bool:
    try:
        found.kt_sources.restype = c_char_p
        return bool(found.kt_sources() == fingerprint().encode())
    except AttributeError:
        return False


def kernels() -> CDLL:
    """The library, where :func:`library` has one."""
    found = library()
    assert isinstance(found, CDLL), found
    return found


def _join_team(found: CDLL) -> None:
    """Let it compute in the team of threads in which PyTorch does."""
    openmp = pytorch_openmp()
    names = "GOMP_parallel", "GOMP_barrier", "omp_get_thread_num", "omp_get_num_threads"
    if all(hasattr(openmp, name) for name in names):
        found.kt_set_team(*(ctypes.cast(getattr(openmp, name), c_void_p) for name in names))
        # a forked process has none of the team's threads: it would wait for them for ever
        os.register_at_fork(after_in_child=lambda: found.kt_set_team(None, None, None, None))


__all__ = [
    "DTYPES", "MOST_LINEARS", "PANEL", "STEPS", "VARIABLE", "AttentionCall", "ExpertsCall", "HeadsCall", "LinearCall", "LinearsCall", "NormCall", "PackingCall", "QuantizationCall", "Step", "Weight", "byref",
    "from_panels", "in_panels", "kernels", "library",
]  # fmt: skip
