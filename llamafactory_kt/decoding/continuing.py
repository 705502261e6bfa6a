"""How a model goes on with a cache that holds tokens already: found out by asking it.

Attention computes several new tokens as it would have computed them with all the others. transformers' linear attention begins anew with
them in versions before 5.24, and goes on with one token alone. And a model may keep of the past what is in no cache: DeepSeek's indexer did.
"""

from __future__ import annotations

from typing import Any

import torch
import transformers
from transformers.cache_utils import DynamicCache

from ..ground.measurements import Remembered
from ..model.router_counts import uncounted
from ..model.state import kt_state
from ..prompt_cache import layers

TOGETHER, ONE_BY_ONE, NEVER = "together", "one by one", "never"
_PART = 4
"""tokens before, and as many after"""
_NEAR = 1 / 3
"""of the distance at which logits are that know nothing of the tokens before: rounding is far below, a lost layer above"""


def way_to_continue(model: Any, ids: torch.Tensor, name: str) -> str:
    """How tokens go on with what earlier ones have left in a cache, whatever was computed in between.

    Asked once for a class, with the first tokens of a prompt.

    Args:
        ids: int64 [1, T]. With fewer than eight tokens the answer is never, and is not remembered; and with layers of unknown kinds.
        name: the argument that is the cache.
    """
    state = kt_state(model)
    if state.continues is None and layers.are_known(_cache(model)) and ids.shape[1] >= 2 * _PART:
        kinds = sorted({type(layer).__name__ for layer in _cache(model).layers})
        facts = {"continues": [type(model).__name__, model.config.model_type, transformers.__version__, *kinds]}
        known = Remembered(facts) if type(model).__module__.startswith("transformers.") else None
        state.continues = known.recall(_read) if known is not None else None
        if state.continues is None:
            with uncounted():
                state.continues = _ask(model, ids[:, : 2 * _PART], name)
            if known is not None:
                known.keep(state.continues)
    return state.continues or NEVER


def _read(way: str) -> str:
    if way not in (TOGETHER, ONE_BY_ONE, NEVER):
        raise ValueError(way)
    return way


def _ask(model: Any, ids: torch.Tensor, name: str) -> str:
    def logits(cache: Any, part: torch.Tensor) -> torch.Tensor:
        """float32 [T, V]"""
        found: torch.Tensor = model(input_ids=part, use_cache=True, **{name: cache}).logits
        return found[0].float()

    before, after = ids.split(_PART, 1)
    whole, alone = logits(_cache(model), ids), logits(_cache(model), after)
    for way, parts in ((TOGETHER, [after]), (ONE_BY_ONE, after.split(1, 1))):
        cache = _cache(model)
        logits(cache, before)
        logits(_cache(model), after)  # another conversation comes between
        try:
            found = torch.cat([logits(cache, part) for part in parts])
        except Exception:  # of a model's code that does not expect this
            continue
        if (found - whole[_PART:]).norm() < _NEAR * (alone - whole[_PART:]).norm():
            return way
    return NEVER


def _cache(model: Any) -> Any:
    return DynamicCache(config=model.config.get_text_config(decoder=True))
