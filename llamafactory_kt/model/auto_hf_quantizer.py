"""``transformers.quantizers.auto.AutoHfQuantizer``: a :class:`KTExpertsConfig` goes with a checkpoint that is quantized itself.

transformers has one quantizer for a model and refuses two; ours reads the checkpoint's format too. Other quantizers are left
alone.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

from transformers.quantizers.auto import AutoHfQuantizer

from ..ground.internals import TESTED, Internal
from .config import KTExpertsConfig

INTERNAL = Internal("quantized-checkpoints", "transformers", TESTED["transformers"], essential=True)


def accept_quantized_checkpoints() -> None:
    """Let ``from_pretrained`` put the checkpoint's own configuration into ours. Elsewhere transformers refuses the two."""
    if not INTERNAL.usable:
        return
    stock = AutoHfQuantizer.merge_quantization_configs

    @functools.wraps(stock)
    def merge(quantization_config: Any, quantization_config_from_args: Any) -> Any:
        if not isinstance(quantization_config_from_args, KTExpertsConfig):
            return stock(quantization_config, quantization_config_from_args)
        own = quantization_config if isinstance(quantization_config, dict) else quantization_config.to_dict()
        return replace(quantization_config_from_args, checkpoint=own)

    AutoHfQuantizer.merge_quantization_configs = staticmethod(merge)
