"""What a loaded model is made ready with, once its adapter is there."""

from __future__ import annotations

import warnings

from torch import nn

from ..model.growing_cache import GROWING, grow_caches
from ..model.state import kt_state, plain_model
from .attention import use_native_attention
from .prepare import prepare_layers
from .quantized_cache import INT8


def optimize_for_inference(model: nn.Module) -> None:
    """Make what is around the experts faster, as LLaMA-Factory's chats with ``use_kt`` do: the attention, the output layer of
    prompts and, where they are in bfloat16, the linear layers. Their weights go where the CPU reads them fastest, and PEFT's LoRA,
    unmerged, is computed in fewer steps, also on a GPU.

    The answers are the same but for rounding. ``apply_adapter`` and ``switch_adapter`` still work, before and afterwards; PEFT's own
    ``merge_adapter`` does not. Waits for generations that run. Calling it again does nothing more.

    Args:
        model: a model with KT experts, plain or wrapped by PEFT; it is changed in place.

    Raises:
        KTModelError: The model has no KT experts.
        RuntimeError: The calling thread is generating with this model.
    """
    state, base = kt_state(model), plain_model(model)

    def optimize() -> None:
        if not state.optimized:
            use_native_attention(base)
            grow_caches(base, INT8 if state.options.cache_bits else GROWING)
        prepare_layers(base, copy=not state.options.mapped, bits=state.options.dense_bits, cached=state.cached_dense)
        state.optimized = True

    state.lock.alone(optimize)


def prepare_for_inference(model: nn.Module) -> None:
    """The earlier name of :func:`optimize_for_inference`."""
    warnings.warn(
        "prepare_for_inference is now called optimize_for_inference; the old name goes with the next version.",
        DeprecationWarning, stacklevel=2,
    )  # fmt: skip
    optimize_for_inference(model)
