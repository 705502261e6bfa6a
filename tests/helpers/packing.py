"""The layouts that weights can be packed in, how a test uses each of them on any CPU, and which layers are packed."""

from __future__ import annotations

import pytest
from torch import nn

from llamafactory_kt.matmul import column_tiles, layouts, linear
from llamafactory_kt.matmul.layouts import is_packed
from llamafactory_kt.matmul.linear import PreparedLinear

from .marks import needs_bfloat16_kernels

PACKED = [pytest.param("oneDNN's layout", marks=needs_bfloat16_kernels), "columns"]


def pack_as(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """Pack weights in one of the layouts in ``PACKED``. Column tiles are made narrow, so that small sizes fit."""
    if kind == "columns":
        pretend_no_bfloat16_kernels(monkeypatch)
        monkeypatch.setattr(column_tiles, "WIDTH", 8)


def pretend_no_bfloat16_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compute as a CPU without AVX-512 would."""
    for module in (linear, layouts):
        monkeypatch.setattr(module, "has_bfloat16_kernels", lambda: False)


def prepared_names(model: nn.Module, only_packed: bool = False) -> set[str]:
    """The last part of the names of prepared layers, or only of those whose weights are packed."""
    prepared = ((name, module) for name, module in model.named_modules() if isinstance(module, PreparedLinear))
    return {n.rpartition(".")[2] for n, m in prepared if is_packed(m.weight) or not only_packed}
