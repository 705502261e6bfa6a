"""transformers' extension point for replacing modules while a model is built: its quantizer.

It is called before the weights are read, when the experts modules are replaced, so that transformers never reads their tensors;
and once more afterwards, when the engines are filled.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.quantizers.auto import register_quantizer
from transformers.quantizers.base import HfQuantizer

from .auto_hf_quantizer import accept_quantized_checkpoints
from .config import QUANT_METHOD, KTExpertsConfig
from .experts_module import KTExperts
from .load import ExpertsLoad
from .load_plan import LoadPlan
from .loading_rules import Decode, loading_rules

__all__ = ["KTExperts", "KTExpertsConfig", "KTExpertsQuantizer"]

accept_quantized_checkpoints()


@register_quantizer(QUANT_METHOD)
class KTExpertsQuantizer(HfQuantizer):  # type: ignore[misc]
    """Puts a :class:`~llamafactory_kt.model.state.KTState` on the model."""

    quantization_config: KTExpertsConfig

    def get_weight_conversions(self) -> list[Any]:
        """How transformers reads all but the experts; asked for after the model was processed."""
        return loading_rules(self._load.format)

    def get_new_dtype(self, converter: Any, param: Any, dtype: torch.dtype | None) -> torch.dtype | None:
        """What newer versions of transformers convert a stored tensor to before its conversion rule gets it: parts of a quantized
        weight stay as they are stored."""
        return None if any(isinstance(step, Decode) for step in getattr(converter, "operations", ())) else dtype

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: list[str] | None = None, device_map: Any = None, **kwargs: Any
    ) -> None:
        everything_on_cpu = device_map in (None, {"": "cpu"}, {"": torch.device("cpu")})
        on_gpu = torch.cuda.is_available() and not everything_on_cpu
        self._load = ExpertsLoad(LoadPlan(self.quantization_config, model, checkpoint_files or [], on_gpu=on_gpu))
        self._load.replace_experts()
        known = getattr(model, "_keys_to_ignore_on_load_unexpected", None)
        kind = set if isinstance(known, set) else list  # a list in transformers 5.6, a set in 5.24, which adds to it
        model._keys_to_ignore_on_load_unexpected = kind([*(known or ()), *self._load.unexpected])
        # Whatever transformers found in config.json: parts of quantized weights keep their dtypes until they are decoded.
        self.pre_quantized = bool(self._load.format.parts)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        self._load.fill()
        del self._load  # which holds the model
        vars(model).pop(
            "quantization_method", None
        )  # all but the experts is as ever: LLaMA-Factory may resize the embeddings
        return model

    def is_serializable(self) -> bool:
        return False

    @property
    def is_compileable(self) -> bool:
        """Whether ``generate`` compiles a token's step where transformers sees fit."""
        return self.quantization_config.compile

    @property
    def is_trainable(self) -> bool:
        return False
