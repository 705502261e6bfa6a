"""The kernels as functions of tensors. All tensors lie on the CPU; sums are float32."""

from __future__ import annotations

from ctypes import c_int64

import torch

from .coded_rows import CodedRows, decoded
from .library import DTYPES, AttentionCall, LinearCall, Weight, byref, in_panels, kernels
from .recording import active
from .scratch import scratch

_Strides = c_int64 * 3


def linear(
    x: torch.Tensor, weight: torch.Tensor, a: torch.Tensor | None, b: torch.Tensor | None, bias: torch.Tensor | None, threads: int
) -> torch.Tensor:  # fmt: skip
    """``W x + B (A x) + bias``.

    Args:
        x: [T, in], contiguous, float32, bfloat16 or float16.
        weight: [out, in] of any of these dtypes; its rows are contiguous, and may lie apart.
        a: [r, in] and b: [out, r], contiguous float32, or None.
        bias: [out], float32, or None.

    Returns:
        [T, out] in the dtype of ``x``.
    """
    rows, cols = weight.shape
    b = in_panels(b) if b is not None else None
    own = Weight(weight.data_ptr(), weight.stride(0), _address(a), _address(b), _address(bias))
    call = LinearCall(rows, cols, a.shape[0] if a is not None else 0, DTYPES[weight.dtype], None, own)
    out = torch.empty(len(x), rows, dtype=x.dtype)
    memory = scratch(kernels().kt_linear_scratch(byref(call), len(x), threads))
    kernels().kt_linear_forward(byref(call), x.data_ptr(), DTYPES[x.dtype], len(x), out.data_ptr(), memory, threads)
    return out


def attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float, window: int = 0, sinks: torch.Tensor | None = None,
    mask: torch.Tensor | None = None, *, threads: int,
) -> torch.Tensor:  # fmt: skip
    """Causal attention of one query to thousands, the last positions of the keys. Memory beside the result does not grow with the queries.

    Args:
        q: [batch, heads, queries, key_dim]; k: [batch, kv_heads, keys, key_dim]; v: [batch, kv_heads, keys, value_dim]; of one dtype, the
            last dimension contiguous. Where keys and values are :class:`CodedRows`, their codes are read.
        window: positions that a query sees, its own included; 0 for all.
        sinks: [heads] logits that take part in each softmax, float32.
        mask: [batch, keys], bool: keys that are seen at all.

    Returns:
        [batch, queries, heads, value_dim]; zeros for a query that sees no key.
    """
    batch, heads, queries, key_dim = q.shape
    kv_heads, keys, value_dim = v.shape[1:]
    coded = isinstance(k, CodedRows) and isinstance(v, CodedRows)
    k, v = (k.rows, v.rows) if coded else (decoded(k), decoded(v))  # type: ignore[attr-defined]
    out = torch.empty(batch, queries, heads, value_dim, dtype=q.dtype)
    strides = (_Strides(*tensor.stride()[:3]) for tensor in (q, k, v))
    call = AttentionCall(
        batch, heads, kv_heads, queries, keys, key_dim, value_dim, DTYPES[q.dtype], coded, scale, window,
        q.data_ptr(), k.data_ptr(), v.data_ptr(), *strides, _address(sinks), _address(mask), out.data_ptr(),
    )  # fmt: skip
    kernels().kt_attention_forward(byref(call), scratch(kernels().kt_attention_scratch(byref(call), threads)), threads)
    if active.recorder is not None:
        active.recorder.note("attention", (scale, window, sinks), (q, k, v) if mask is None else (q, k, v, mask), out)
    return out


def _address(tensor: torch.Tensor | None) -> int | None:
    return tensor.data_ptr() if tensor is not None else None
