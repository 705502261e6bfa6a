"""How weights are stored in checkpoints: one file a format.

A new format is a subclass of :class:`Format` in a file of its own, and its name in :data:`FORMATS`.
"""

from __future__ import annotations

from typing import Any

from ...ground.errors import KTModelError
from .awq import Awq
from .compressed_tensors import CompressedTensors
from .format import FLOATS, WHOLE, Format, Shape
from .fp8 import Fp8, ScaledFp8
from .gptq import Gptq
from .mxfp4 import Mxfp4

__all__ = ["FLOATS", "FORMATS", "WHOLE", "Format", "Shape", "format_of"]

FORMATS: tuple[type[Format], ...] = (Fp8, ScaledFp8, CompressedTensors, Mxfp4, Gptq, Awq)
"""of quantized checkpoints"""


def format_of(config: Any) -> Format:
    """The format of a checkpoint's weights.

    Args:
        config: the model's configuration; of a composite model, also that of its text model may say it.

    Raises:
        KTModelError: The checkpoint is quantized in a way that cannot be read.
    """
    values = quantization(config)
    if not values:
        return Format()
    for kind in FORMATS:
        if (found := kind.from_config(values)) is not None:
            return found
    raise KTModelError(
        f"The model is a quantized checkpoint (quant_method: {values.get('quant_method')} in config.json), which use_kt cannot read. "
        "It reads FP8, compressed-tensors (INT4, INT8, FP8), GPTQ, AWQ and MXFP4 checkpoints. Use one of these, or the model's "
        "unquantized checkpoint, whose experts kt_backend: AMXINT4 packs to 4 bits."
    )


def quantization(config: Any) -> dict[str, Any]:
    """A configuration's ``quantization_config``, empty if there is none."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    for part in (config, text):
        stored: Any = getattr(part, "quantization_config", None)
        if getattr(stored, "quant_method", None) == "kt_experts":  # ours replaces the checkpoint's own
            stored = stored.checkpoint
        if stored:
            values = dict(stored if isinstance(stored, dict) else stored.to_dict())
            method = values.get("quant_method")
            return {**values, "quant_method": str(getattr(method, "value", method))}
    return {}
