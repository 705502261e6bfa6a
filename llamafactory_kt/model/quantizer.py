"""transformers' extension point for replacing modules while a model is built: its quantizer.

It is called before the weights are read, when the experts modules are replaced, so that transformers never reads their tensors;
and once more afterwards, when the engines are filled.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from transformers.quantizers.auto import register_quantizer
from transformers.quantizers.base import HfQuantizer

from ..checkpoint.fp8 import block_size
from .auto_hf_quantizer import accept_quantized_checkpoints
from .config import QUANT_METHOD, KTExpertsConfig
from .experts_module import KTExperts
from .fp8_rules import loading_rules
from .load import ExpertsLoad

__all__ = ["KTExperts", "KTExpertsConfig", "KTExpertsQuantizer"]

accept_quantized_checkpoints()


@register_quantizer(QUANT_METHOD)
class KTExpertsQuantizer(HfQuantizer):  # type: ignore[misc]
    """Puts a :class:`~llamafactory_kt.model.state.KTState` on the model."""

    quantization_config: KTExpertsConfig

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Is the checkpoint's format one that can be read?"""
        block_size(self.quantization_config)

    def get_weight_conversions(self) -> list[Any]:
        """How transformers reads all but the experts."""
        block = block_size(self.quantization_config)
        return loading_rules(block) if block is not None else []

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: list[str] | None = None, device_map: Any = None, **kwargs: Any
    ) -> None:
        everything_on_cpu = device_map in (None, {"": "cpu"}, {"": torch.device("cpu")})
        on_gpu = torch.cuda.is_available() and not everything_on_cpu
        self._load = ExpertsLoad(self.quantization_config, model, checkpoint_files or [], on_gpu=on_gpu)
        self._load.replace_experts()
        # transformers will find just these tensors unexpected, as no parameter asks for them any more.
        known = getattr(model, "_keys_to_ignore_on_load_unexpected", None)
        kind = (
            set if isinstance(known, set) else list
        )  # transformers adds to what it has made itself: a list in 5.6, a set in 5.24
        replaced = (f"^{re.escape(name)}$" for name in sorted(self._load.tensors))
        model._keys_to_ignore_on_load_unexpected = kind([*(known or ()), *replaced])

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        self._load.fill()
        del self._load  # which holds the model
        return model

    def is_serializable(self) -> bool:
        return False

    @property
    def is_trainable(self) -> bool:
        return False
