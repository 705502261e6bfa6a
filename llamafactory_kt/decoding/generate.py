"""The loop of ``generate`` for a model whose earlier prompts and answers are kept (:mod:`..prompt_cache`).

A prompt is read in chunks: memory stays flat with its length, and somebody can watch, and stop. transformers does the rest, as always.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import transformers

from .._version import __version__
from ..ground.file_hash import file_versions
from ..ground.internals import CACHE_ARGUMENTS, TESTED, Internal
from ..ground.machine import available_memory
from ..model.experts_module import before_layers
from ..model.growing_cache import GROWING, let_grow_once
from ..model.state import KTState, kt_state
from ..prompt_cache import layers
from ..prompt_cache.files import PromptFiles
from ..prompt_cache.pool import Kept, PromptPool
from .choosing import Chooser
from .continuing import NEVER, ONE_BY_ONE, TOGETHER, way_to_continue
from .quantized_cache import INT8

INTERNAL = Internal("prompt-cache", "transformers", TESTED["transformers"])
CHUNK = 512
"""tokens of a prompt that are read at once"""
LEAST_MEMORY = 2**28
"""bytes"""
TOKEN_TYPES = "token_type_ids", "mm_token_type_ids"
"""arguments of ``generate`` [B, T], 0 for text"""
REWRITTEN = 16
"""tokens at a prompt's end that the next one may not have, such as the opening of a thought"""
MARKS = 4
"""of a sequence, the newest"""
COST_OF_ONE = 16
"""tokens that are read together in the time of one alone, or fewer"""


class Reading(Protocol):
    """Whoever watches a prompt being read, in the thread that reads it."""

    cached_tokens: int
    """of the prompt, those that were kept from earlier"""

    def read(self, tokens: int) -> bool:
        """Called when so many tokens of the prompt are there, and before the layers of a part, each of which counts for its share;
        returns whether to go on."""


def keep_prompts(state: KTState, wanted: bool = True, gib: float | None = None, directory: Path | None = None) -> None:
    """Keep keys and values of a model's prompts and answers from now on, or no longer.

    Args:
        gib: the most that they may take; by default a quarter of the memory that is free now, without that of mapped weights, which the
            system would give away.
        directory: for the beginnings that conversations share.
    """
    mapped = sum(wrapper.engine.nbytes for wrapper in state.wrappers) if state.options.mapped else 0
    share = max(LEAST_MEMORY, (available_memory() - mapped) // 4)
    nbytes = share if gib is None else int(gib * 2**30)
    state.prompts = PromptPool(nbytes, directory) if wanted and INTERNAL.usable else None


def can_reuse(model: Any, config: Any) -> bool:
    """Whether ``generate`` with this GenerationConfig may begin with what is kept: it chooses token by token, and makes the cache itself."""
    usual = (config.num_beams or 1) == 1 and not config.cache_implementation and config.use_cache is not False
    return usual and kt_state(model).prompts is not None


def generate(
    model: Any,
    input_ids: torch.Tensor,
    reading: Reading,
    head: int = 0,
    chooser: Chooser | None = None,
    **arguments: Any,
) -> torch.Tensor:
    """For ``generate(custom_generate=...)`` of transformers, in place of its own ``_sample``.

    Args:
        input_ids: int64 [B, T]: a prompt of text, once for each answer to it.
        head: tokens with which other conversations begin, too.
        chooser: chooses the tokens, if a request has wishes.

    Returns:
        int64 [B, T + new tokens]; [B, T] if reading was stopped.
    """
    if chooser is not None:
        arguments = chooser.around(arguments)
    with torch.inference_mode(False), torch.no_grad():  # what is kept is changed by generations of either mode
        name = next((name for name in CACHE_ARGUMENTS if arguments.get(name) is not None), None)
        if name is None:  # the model makes a cache of its own
            return _sample(model, input_ids, arguments)
        return _Generation(model, input_ids, reading, arguments, name, head).run()


def sample(model: Any, input_ids: torch.Tensor, chooser: Chooser, **arguments: Any) -> torch.Tensor:
    """For ``generate(custom_generate=...)``, with nothing kept: prompts with media."""
    return _sample(model, input_ids, chooser.around(arguments))


def _sample(model: Any, input_ids: torch.Tensor, arguments: dict[str, Any]) -> torch.Tensor:
    found: torch.Tensor = model._sample(input_ids, **arguments)
    return found


def facts(model: Any, state: KTState) -> list[Any]:
    """All that keys and values depend on besides the tokens; JSON values."""
    source, options = Path(model.config._name_or_path).expanduser(), state.options
    directories = [path for path in (source, options.packed_files) if path is not None and path.is_dir()]
    return [
        [__version__, transformers.__version__, torch.__version__],
        [str(source), getattr(model.config, "_commit_hash", None), *map(file_versions, directories)],
        [type(model).__name__, str(model.dtype), state.engine.name, options.dense_bits, options.cache_bits],
        state.weights_key,
    ]


class _Stopped(Exception):
    """Nobody wants the answer any more."""


class _Generation:
    """One call of ``generate``.

    Args:
        name: the argument that is the cache.
    """

    def __init__(
        self, model: Any, input_ids: torch.Tensor, reading: Reading, arguments: dict[str, Any], name: str, head: int
    ):
        self._model, self._reading, self._arguments, self._name = model, reading, arguments, name
        self._input_ids, self._ids = input_ids, input_ids[0].cpu().numpy()
        self._whole = len(self._ids) - (len(input_ids) > 1)
        """tokens of the prompt of which some are left for ``_sample``; several answers get all but the last from here"""
        state = kt_state(model)
        assert state.prompts is not None
        self._pool, key, self._layers = state.prompts, state.weights_key, len(state.wrappers)
        fresh = Kept(key, self._ids[:0], arguments[name])
        # of several answers to one token, each reads it itself
        known = self._whole > 0 and layers.are_known(fresh.cache)
        asked = self._pool.sequences or len(self._ids) > CHUNK or len(input_ids) > 1 or layers.forgets(fresh.cache)
        self._way = (way_to_continue(model, input_ids[:1], name) if asked else TOGETHER) if known else NEVER
        # two tokens at least are left to read: a call with one is a token of an answer, for whoever counts
        kept = None if self._way == NEVER else self._pool.take(self._ids, key, len(self._ids) - 2)
        if kept is None or (
            self._way == ONE_BY_ONE and COST_OF_ONE * (len(self._ids) - len(kept.ids)) > len(self._ids)
        ):
            kept = fresh
        self._files, self._head = None, head
        if self._pool.directory is not None and head and self._way == TOGETHER:
            self._files = PromptFiles(self._pool.directory, facts(model, state), self._pool.most_nbytes)
            if len(kept.ids) < head < len(self._ids) - 1:
                let_grow_once(fresh.cache, INT8 if state.options.cache_bits else GROWING)
                if self._files.read(self._ids[:head], fresh.cache):
                    kept = Kept(key, self._ids[:head], fresh.cache)
        self._kept, self._done = kept, len(kept.ids)
        reading.cached_tokens = self._done

    def run(self) -> torch.Tensor:
        if self._way == NEVER:
            return _sample(self._model, self._input_ids, self._arguments)
        found, failed = self._input_ids, True
        try:
            for end in self._ends():
                with self._watched(end):
                    self._forward(end)
                self._done = end
                if end == self._mark():
                    self._kept.marks[end] = layers.states_of(self._kept.cache)
            cache = self._kept.cache
            if len(found) > 1:
                cache = layers.copied(cache, self._whole, {})
                cache.batch_repeat_interleave(len(found))
            with self._watched(len(self._ids)):
                found = _sample(self._model, found, {**self._arguments, self._name: cache})
            failed = False
        except _Stopped:
            failed = False
        finally:
            self._keep(getattr(found, "sequences", found)[0].cpu().numpy(), failed)
        return found

    @contextlib.contextmanager
    def _watched(self, end: int) -> Iterator[None]:
        """While the next part of the prompt is read, up to ``end``: tell how far it is before each layer, and stop if that is wished."""
        number, start, forgets = count(), self._done, layers.forgets(self._kept.cache)

        def look(may_stop: bool = not forgets) -> None:
            if (layer := next(number)) >= self._layers:  # of an answer's tokens
                return
            if not self._reading.read(start + (end - start) * layer // self._layers) and may_stop:
                raise _Stopped

        if forgets:  # once they have begun, layers cannot go back
            look(may_stop=True)
        with before_layers(look):
            yield

    def _ends(self) -> list[int]:
        """The ends of the parts that are read before ``_sample`` reads the last."""
        done, last = self._done, len(self._ids) - 1
        if self._way == ONE_BY_ONE:
            return list(range(done + 1, last + 1)) if done else [last]
        ends = {self._mark(), *range(done + CHUNK, self._mark() or self._whole, CHUNK)}
        if self._whole < len(self._ids):
            ends.add(self._whole)
        return sorted(end for end in ends if end > done)

    def _mark(self) -> int:
        """The number of tokens after which the states of layers that cannot be cut are copied; 0 for nowhere."""
        if not layers.forgets(self._kept.cache):
            return 0
        return len(self._ids) - 1 if self._way == ONE_BY_ONE else max(0, self._whole - REWRITTEN)

    def _forward(self, end: int) -> None:
        start = self._done
        given = {**self._arguments, self._name: self._kept.cache}
        for name in ("logits_processor", "stopping_criteria", "generation_config", "synced_gpus", "streamer"):
            given.pop(name, None)
        for name in ("attention_mask", "position_ids", *TOKEN_TYPES):
            if given.get(name) is not None:
                given[name] = given[name][..., :1, :end] if given[name].dim() > 2 else given[name][:1, :end]
        inputs = self._model.prepare_inputs_for_generation(
            self._input_ids[:1, :end], next_sequence_length=end - start, is_first_iteration=start == 0, **given
        )
        self._model(**inputs, return_dict=True)

    def _keep(self, ids: np.ndarray, failed: bool) -> None:
        """Keep what the cache holds, of the prompt and its first answer; of its newest part nothing where the model failed in it."""
        kept = self._kept
        held = layers.length(kept.cache)
        # something broke off in the middle of the layers, or before its token was chosen
        if failed or held is None or held > len(ids):
            held = 0 if self._done and layers.fixed(kept.cache) else self._done
        if not held:
            return
        layers.cut(kept.cache, held, {})
        layers.park(kept.cache)
        if self._files is not None and held >= self._head:
            self._files.write(ids[: self._head], kept.cache)
        self._pool.keep(Kept(kept.key, ids[:held], kept.cache, dict(list(kept.marks.items())[-MARKS:])))
