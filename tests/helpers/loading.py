"""Load models with KT experts, and get their answers to fixed tokens."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from llamafactory_kt import KTExpertsConfig

ONE_ROW = torch.arange(2, 40)[None]
TWO_ROWS = torch.arange(30, 70).reshape(2, 20)


def load(path: Path, backend: str = "auto", *, dtype: torch.dtype = torch.bfloat16, **keys):
    """``keys`` are KTExpertsConfig's."""
    return AutoModelForCausalLM.from_pretrained(
        path, dtype=dtype, quantization_config=KTExpertsConfig(backend=backend, **keys)
    )


@torch.inference_mode()
def answer(model) -> torch.Tensor:
    """Logits for one row of tokens, in the model's dtype."""
    return model(input_ids=ONE_ROW).logits


@torch.inference_mode()
def logits(model) -> torch.Tensor:
    """Logits for two rows of tokens, in float32."""
    return model(input_ids=TWO_ROWS).logits.float()
