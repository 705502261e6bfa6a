"""How weights are stored in checkpoints: one file a format.

A new format is a subclass of :class:`Format` in a file of its own, and its name in :data:`FORMATS`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ...ground.errors import KTModelError
from .auto_round import auto_round
from .awq import Awq
from .compressed_tensors import CompressedTensors
from .format import FLOATS, READ, WHOLE, Format, Shape
from .fp8 import Fp8, ScaledFp8
from .gptq import Gptq
from .mxfp4 import Mxfp4
from .nvfp4 import Nvfp4
from .source import check_file, stored_values
from .values import Values

__all__ = ["FLOATS", "FORMATS", "READ", "WHOLE", "Format", "Shape", "check_file", "format_of", "quantization"]

FORMATS: tuple[type[Format], ...] = (Fp8, Nvfp4, ScaledFp8, CompressedTensors, Mxfp4, Gptq, Awq)
"""of quantized checkpoints"""
_READERS: tuple[Callable[[Values], Format | None], ...] = (*(kind.from_config for kind in FORMATS), auto_round)
_ROTATIONS = ("transform_config", "rotation_config", "spinquant_config")
"""sections that rotate activations while a model computes (compressed-tensors, AutoRound)"""


def format_of(config: Any) -> Format:
    """The format of a checkpoint's weights.

    Args:
        config: the model's configuration; of a composite model, also that of its text model may say it.

    Raises:
        KTModelError: The checkpoint is quantized in a way that cannot be read, or a value that says how is of a wrong type.
    """
    values = stored_values(config)
    if values is None:
        return Format()
    for key in _ROTATIONS:
        if values.section(key).found:
            raise KTModelError(
                f"{values.file}: {key} asks for rotations of the activations, which use_kt does not compute. Use the model's unquantized "
                "checkpoint."
            )
    for reader in _READERS:
        if (found := reader(values)) is not None:
            return found
    raise KTModelError(
        f"The model is a quantized checkpoint (quant_method: {values.text('quant_method')} in {values.file}), which use_kt cannot read. It "
        "reads FP8, NVFP4, compressed-tensors (INT4, INT8, FP8), GPTQ, AWQ, AutoRound and MXFP4 checkpoints. Use one of these, or the model's "
        "unquantized checkpoint, whose experts kt_backend: INT4 quantizes to 4 bits."
    )


def quantization(config: Any) -> dict[str, Any]:
    """What says how a checkpoint is quantized, empty if nothing does.

    Raises:
        KTModelError: It is no object.
    """
    values = stored_values(config)
    return dict(values.found) if values is not None else {}
