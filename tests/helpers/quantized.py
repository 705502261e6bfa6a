"""A model with an adapter, and its experts packed by kt-kernel (``llamafactory-kt quantize``)."""

from __future__ import annotations

from pathlib import Path

from llamafactory_kt.tools.quantize import quantize_model

from .adapters import make_adapter
from .models import make_model


def quantized_model(root: Path) -> tuple[Path, Path, Path]:
    """``root``, which gets ``int8/`` and ``int4/``; the model; and its adapter."""
    model = make_model(root / "model", "deepseek_v2")
    adapter = make_adapter(root / "adapter", model, rank=4)
    for method in ("int8", "int4"):
        report = quantize_model(model, root / method, f"amx{method}")
        assert (report.layers, report.kept) == (2, 0)
    return root, model, adapter
