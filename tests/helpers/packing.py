"""The layouts that weights can be packed in, and how to have a test use each of them on any CPU."""

from __future__ import annotations

import pytest

from llamafactory_kt.matmul import column_tiles, layouts, linear

from .marks import needs_bfloat16_kernels

PACKED = [pytest.param("oneDNN's layout", marks=needs_bfloat16_kernels), "columns"]


def pack_as(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """Pack weights in one of the layouts of ``PACKED``; for columns, small sizes will do."""
    if kind == "columns":
        pretend_no_bfloat16_kernels(monkeypatch)
        monkeypatch.setattr(column_tiles, "WIDTH", 8)


def pretend_no_bfloat16_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compute as CPUs without AVX-512 do."""
    for module in (linear, layouts):
        monkeypatch.setattr(module, "has_bfloat16_kernels", lambda: False)
