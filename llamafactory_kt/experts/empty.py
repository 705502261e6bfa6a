"""A checkpoint's model without its weights, to check names and sizes against."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..errors import KTModelError, KTPathError


def empty_model(name: str | Path, *, quantised: bool = False) -> Any:
    """Build the model on the meta device from its ``config.json``.

    Args:
        name: checkpoint directory, or a name on the hub.
        quantised: take a quantised checkpoint too, as the unquantised model of its sizes.

    Raises:
        KTPathError: There is no such model.
        KTModelError: The checkpoint is quantised.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        config = AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise KTPathError(f"{name} is not a model that can be opened: {str(error).splitlines()[0]}") from error
    if getattr(config, "quantization_config", None) is not None and not quantised:
        raise KTModelError(f"{name} is a quantised checkpoint; bfloat16, float16 or float32 weights are needed.")
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)
