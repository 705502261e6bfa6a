"""PEFT takes modules and tensors by the names it is given, which are the model's own.

From 0.19 on, PEFT translates configurations and tensors that were made with transformers 4: it takes every ``gate_proj``, ``up_proj`` and
``down_proj`` of many mixtures of experts for those of routed experts, and fuses them into LoRA on ``experts.gate_up_proj``. Dense layers and
shared experts have modules of these names too, and KT experts have no such weight. By then our adapters are in the model's names already
(:mod:`.split`), and PEFT has no option to leave them. So while a model of ours is wrapped, the two functions of
``peft.utils.transformers_weight_conversion``, which PEFT looks up at each call, return what they get for that model.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from ..ground.errors import KTAdapterError


@contextlib.contextmanager
def names_as_given(model: Any) -> Iterator[None]:
    """Let PEFT take names as they are for this plain model; others are translated meanwhile as ever.

    Raises:
        KTAdapterError: This PEFT has the module, but not the two functions.
    """
    try:
        from peft.utils import transformers_weight_conversion as conversion
    except ImportError:  # PEFT 0.18 translates nothing
        yield
        return
    stock_config = getattr(conversion, "convert_peft_config_for_transformers", None)
    stock_tensors = getattr(conversion, "convert_peft_adapter_state_dict_for_transformers", None)
    if stock_config is None or stock_tensors is None:
        raise KTAdapterError(
            "This PEFT translates names of modules in a way that is not known here, so that LoRA might land on other modules. Install "
            "a version of PEFT that was tested."
        )

    def config(peft_config: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
        return None if model is ours else stock_config(peft_config, model, *args, **kwargs)

    def tensors(model: Any, peft_config: Any, adapter_state_dict: Any, *args: Any, **kwargs: Any) -> Any:
        if model is ours or model.get_base_model() is ours:
            return adapter_state_dict
        return stock_tensors(model, peft_config, adapter_state_dict, *args, **kwargs)

    ours = model
    conversion.convert_peft_config_for_transformers = config
    conversion.convert_peft_adapter_state_dict_for_transformers = tensors
    try:
        yield
    finally:
        conversion.convert_peft_config_for_transformers = stock_config
        conversion.convert_peft_adapter_state_dict_for_transformers = stock_tensors
