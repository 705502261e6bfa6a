"""The second turn of a conversation: the time to its first token, where keys and values of the first one are kept."""

from __future__ import annotations

import functools
import inspect
import time
from typing import Any

import torch

from ...decoding.continuing import way_to_continue
from ...decoding.generate import generate
from ...ground.internals import CACHE_ARGUMENTS
from ...model.state import has_kt_experts, kt_state, plain_model
from ...prompt_cache import layers
from ...prompt_cache.pool import Kept, PromptPool
from .results import QUESTION, SecondTurn


class _Reading:
    cached_tokens = 0

    def read(self, tokens: int) -> bool:
        return True


def second_turn(model: Any, ids: torch.Tensor, cache: Any) -> SecondTurn | None:
    """Ask again after a conversation; None if nothing is kept of it.

    Args:
        ids: int64 [1, T], what was asked and answered.
        cache: of all of it but the last token; it is used up.
    """
    if (
        not has_kt_experts(model)
        or (state := kt_state(model)).prompts is None
        or (held := layers.length(cache)) is None
    ):
        return None
    generator = torch.Generator().manual_seed(held)
    new = torch.randint(10, model.config.get_text_config().vocab_size, (1, QUESTION), generator=generator)
    whole = torch.cat((ids[:, :held], new.to(ids.device)), 1)
    parameters = inspect.signature(plain_model(model).forward).parameters
    name = next(name for name in CACHE_ARGUMENTS if name in parameters)
    reading, usual = _Reading(), state.prompts
    state.prompts = PromptPool(2**62)
    state.prompts.keep(Kept(state.weights_key, ids[0, :held].cpu().numpy(), layers.copied(cache, held, {})))
    try:
        with torch.no_grad():
            way_to_continue(plain_model(model), whole, name)  # asked once for a machine
            started = time.perf_counter()
            model(input_ids=whole[:, held:], use_cache=True, logits_to_keep=1, **{name: cache})
            forward = time.perf_counter() - started
            started = time.perf_counter()
            model.generate(
                inputs=whole, attention_mask=torch.ones_like(whole), do_sample=False, max_new_tokens=1, pad_token_id=0,
                custom_generate=functools.partial(generate, reading=reading),
            )  # fmt: skip
            first_token = time.perf_counter() - started
    finally:
        state.prompts = usual
    return SecondTurn(first_token, forward) if reading.cached_tokens == held else None
