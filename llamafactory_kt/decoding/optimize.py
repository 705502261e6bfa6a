"""What a loaded model is made ready with, once its adapter is there."""

from __future__ import annotations

from torch import nn

from ..apply import kt_wrappers, plain_model
from .prepare import prepare_layers


def prepare_for_inference(model: nn.Module) -> None:
    """Make the layers around the experts faster where they are in bfloat16, as LLaMA-Factory's chats with ``use_kt`` do:
    weights where the CPU reads them fastest, and PEFT's LoRA, unmerged, in fewer steps, also on a GPU.

    The answers are the same but for rounding. Weights may be packed: they keep shape and dtype, and can be
    neither read from Python nor saved. ``apply_adapter`` and ``switch_adapter`` still work, before and afterwards; PEFT's own
    ``merge_adapter`` does not. Waits for generations that run.

    Args:
        model: a model with KT experts, plain or wrapped by PEFT; it is changed in place.

    Raises:
        KTModelError: The model has no KT experts.
        RuntimeError: The calling thread is generating with this model.
    """
    kt_wrappers(model)
    base = plain_model(model)
    with base._kt_gate.exchange():
        prepare_layers(base)
