"""A checkpoint's model without its weights, to check names and sizes against."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..ground.errors import KTModelError, KTPathError


def empty_model(name: str | Path, *, fp8: bool = False, quantised: bool = False) -> Any:
    """Build the model on the meta device from its ``config.json``.

    Args:
        name: checkpoint directory, or a name on the hub.
        fp8: take an FP8 checkpoint that experts can be read from too.
        quantised: take any quantised checkpoint, as the unquantised model of its sizes.

    Raises:
        KTPathError: There is no such model.
        KTModelError: The checkpoint is quantised, or not as it may be.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from .fp8 import block_size

    try:
        config = AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise KTPathError(f"{name} is not a model that can be opened: {str(error).splitlines()[0]}") from error
    if not quantised and block_size(getattr(config, "quantization_config", None)) is not None and not fp8:
        raise KTModelError(f"{name} is an FP8 checkpoint; bfloat16, float16 or float32 weights are needed here.")
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)
