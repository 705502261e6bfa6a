"""``llamafactory.model.patcher``: attention kernels that LLaMA-Factory asks transformers for, by a name that it no longer has.

LLaMA-Factory gives gpt-oss a FlashAttention-3 kernel from the hub through ``load_and_register_kernel``, which transformers 5.6 to 5.24
lack. Stock LLaMA-Factory dies in an ImportError there.
"""

from __future__ import annotations

import logging
from types import ModuleType
from typing import Any

from ..chat_config import with_kt
from ..patching import expect, replace

logger = logging.getLogger("llamafactory_kt")


def patch(module: ModuleType) -> None:
    """Let models with KT experts keep the attention that transformers gives them, if LLaMA-Factory's is not to be had."""
    stock = expect(module, "configure_attn_implementation")

    def configure_attn_implementation(config: Any, model_args: Any) -> None:
        try:
            stock(config, model_args)
        except ImportError as error:
            if not (with_kt(model_args) and (error.name or "").startswith("transformers.")):
                raise
            logger.warning(
                "LLaMA-Factory's attention for %s is not used, since this transformers lacks it (%s). transformers' own takes its place.",
                config.model_type, error.msg.partition(" (")[0],
            )  # fmt: skip

    replace(module, configure_attn_implementation)
