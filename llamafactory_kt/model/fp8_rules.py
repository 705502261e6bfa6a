"""How transformers reads what is not an expert of an FP8 checkpoint."""

from __future__ import annotations

from typing import Any

import torch
from transformers.core_model_loading import ConversionOps, WeightConverter

from ..checkpoint.fp8 import SCALE_SUFFIX, Block, dequantize


class Fp8Dequantize(ConversionOps):  # type: ignore[misc]
    """Dequantizes a weight while transformers loads it, to the dtype of the model's parameter."""

    def __init__(self, block: Block):
        self._block = block

    @torch.no_grad()
    def convert(
        self, input_dict: dict[str, list[torch.Tensor]], full_layer_name: str, model: Any, **kwargs: Any
    ) -> dict[str, torch.Tensor]:
        dtype = model.get_parameter_or_buffer(full_layer_name).dtype
        value, scale = input_dict["weight$"][0], input_dict.get("weight_scale_inv")
        if scale is not None:
            value = dequantize(value, scale[0], self._block)
        return {full_layer_name: value.to(dtype)}


def loading_rules(block: Block) -> list[WeightConverter]:
    """Rules by which transformers reads the other modules' weights, each with its scales."""
    sources = ["weight$", f"weight{SCALE_SUFFIX}", "activation_scale"]  # the latter is for FP8 arithmetic: not used
    return [WeightConverter(source_patterns=sources, target_patterns="weight", operations=[Fp8Dequantize(block)])]
