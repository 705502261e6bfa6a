"""How transformers reads what is not an expert of a quantized checkpoint."""

from __future__ import annotations

import re
from typing import Any

import torch
from transformers.core_model_loading import ConversionOps, WeightConverter

from ..checkpoint.formats import WHOLE, Format

_WEIGHT = ".weight"


class Decode(ConversionOps):  # type: ignore[misc]
    """Decodes a weight while transformers loads it, to the dtype of the model's parameter.

    Args:
        form: the checkpoint's.
        sources: pattern of stored names -> part of the weight.
    """

    def __init__(self, form: Format, sources: dict[str, str]):
        self._form, self._sources = form, sources

    @torch.no_grad()
    def convert(
        self, input_dict: dict[str, list[torch.Tensor]], full_layer_name: str, model: Any, **kwargs: Any
    ) -> dict[str, torch.Tensor]:
        parameter = model.get_parameter_or_buffer(full_layer_name)
        parts = {self._sources[pattern]: tensors[0] for pattern, tensors in input_dict.items()}
        value = parts[WHOLE] if parts.keys() == {WHOLE} else self._form.decode(parts, tuple(parameter.shape))
        return {full_layer_name: value.to(parameter.dtype)}


def loading_rules(form: Format) -> list[WeightConverter]:
    """The rules by which transformers reads the other modules' weights, quantized or not; none for an unquantized checkpoint."""
    if not form.parts:
        return []
    endings = {WHOLE: _WEIGHT} | {part: form.stored_name(_WEIGHT, part) for part in form.parts}
    sources = {f"{re.escape(ending)}$": part for part, ending in endings.items()}
    return [WeightConverter(source_patterns=[*sources], target_patterns=_WEIGHT, operations=[Decode(form, sources)])]
