"""The pool over thousands of turns, with a model that is easy to check: keys are tokens and places, a state is the sum of all tokens."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer, LinearAttentionLayer

from llamafactory_kt.model.growing_cache import let_grow
from llamafactory_kt.prompt_cache import layers
from llamafactory_kt.prompt_cache.pool import LEAST, TAIL, Kept, PromptPool

WINDOW = 24
KINDS = {
    "full": lambda: [DynamicLayer(), DynamicLayer()],
    "window": lambda: [DynamicLayer(), DynamicSlidingWindowLayer(sliding_window=WINDOW)],
    "linear": lambda: [LinearAttentionLayer(), DynamicLayer()],
}


def state_of(layer: LinearAttentionLayer) -> torch.Tensor:
    """Later versions of transformers have several."""
    states = layer.recurrent_states
    return states if isinstance(states, torch.Tensor) else states[0]


class Model:
    """Reads tokens into a cache."""

    def __init__(self, kind: str):
        self.kind, self.read_tokens = kind, 0

    def fresh(self) -> DynamicCache:
        cache = DynamicCache()
        cache.layers, cache.layer_class_to_replicate = KINDS[self.kind](), None
        let_grow(cache)
        return cache

    def read(self, cache: DynamicCache, ids: np.ndarray) -> None:
        if not len(ids):
            return
        self.read_tokens += len(ids)
        held = layers.length(cache) or 0
        places = torch.arange(held, held + len(ids))
        rows = torch.stack((torch.from_numpy(ids), places), -1).float()[None, None]
        for layer in cache.layers:
            if isinstance(layer, DynamicLayer):
                layer.update(rows, -rows)
            else:
                before = state_of(layer) if held else torch.zeros(1, 1)
                layer.update_conv_state(torch.zeros(1, 1, 2))  # which tells the dtype
                layer.update_recurrent_state(before + float(ids.sum()))

    def check(self, cache: DynamicCache, ids: np.ndarray) -> None:
        whole = torch.stack((torch.from_numpy(ids), torch.arange(len(ids))), -1).float()[None, None]
        for layer in cache.layers:
            if isinstance(layer, DynamicLayer):
                assert layer.get_seq_length() == len(ids)
                wanted = whole[:, :, -WINDOW + 1 :] if isinstance(layer, DynamicSlidingWindowLayer) else whole
                assert torch.equal(layer.keys, wanted) and torch.equal(layer.values, -wanted)
            else:
                assert float(state_of(layer)) == float(ids.sum())


def answer(model: Model, pool: PromptPool, prompt: np.ndarray, reply: np.ndarray, key="one", stop=None) -> int:
    """What a generation does; returns the tokens that were kept."""
    kept = pool.take(prompt, key, len(prompt) - 2) or Kept(key, prompt[:0], model.fresh())
    if len(kept.ids):
        model.check(kept.cache, kept.ids)
    assert np.array_equal(kept.ids, prompt[: len(kept.ids)])
    found = len(kept.ids)
    mark = max(found, len(prompt) - 5)
    model.read(kept.cache, prompt[found:mark])
    if layers.forgets(kept.cache) and mark > found:
        kept.marks[mark] = layers.states_of(kept.cache)
    ids = np.concatenate((prompt, reply))
    end = len(ids) - 1 if stop is None else min(stop, len(ids) - 1)
    end = max(end, mark)
    model.read(kept.cache, ids[mark:end])
    model.check(kept.cache, ids[:end])
    pool.keep(Kept(key, ids[:end], kept.cache, kept.marks))
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_a_thousand_turns_of_twenty_conversations(kind):
    """Edits, branches, shared beginnings, stops, two adapters: the right numbers, within the bound, and most of them reused."""
    choose = random.Random(1)
    tokens = np.random.default_rng(1)
    new = lambda least, most: tokens.integers(0, 100, choose.randint(least, most))  # noqa: E731
    model, pool = Model(kind), PromptPool(60_000)
    system = new(40, 40)
    conversations = [np.concatenate((system, new(5, 30))) for _ in range(20)]
    asked = reused = 0
    for turn in range(1000):
        number = choose.randrange(20)
        ids, key = conversations[number], choose.choice(["one", "one", "one", "two"])
        if choose.random() < 0.1:  # an edit in the middle
            ids = np.concatenate((ids[: choose.randint(20, len(ids))], new(3, 20)))
        if len(ids) > 300:
            ids = np.concatenate((system, new(5, 30)))
        reply = new(3, 40)
        found = answer(model, pool, ids, reply, key, stop=choose.randrange(len(ids)) if turn % 13 == 0 else None)
        asked, reused = asked + len(ids), reused + found
        assert pool.nbytes <= pool.most_nbytes
        if choose.random() < 0.7:
            rewritten = choose.random() < 0.3  # as templates do that drop thoughts
            conversations[number] = np.concatenate((ids, reply[2:] if rewritten else reply, new(3, 25)))
    assert reused > asked / 4


def test_the_longest_beginning_counts():
    model, pool = Model("full"), PromptPool(10**6)
    a, b = np.arange(100), np.concatenate((np.arange(60), np.arange(200, 250)))
    for ids in (a, b):
        answer(model, pool, ids, np.array([7]))
    assert answer(model, pool, np.concatenate((a[:90], b[60:])), np.array([7])) == 90
    assert pool.sequences == 2, "ten tokens were lost in place"
    assert answer(model, pool, np.concatenate((b[:70], a)), np.array([7])) == 70
    assert pool.sequences == 3, f"more than {TAIL} were kept for whoever comes back"
    assert answer(model, pool, b, np.array([7])) == len(b) - 2
    assert answer(model, pool, np.concatenate((a[: LEAST - 1], b)), np.array([7])) == 0
    assert answer(model, pool, a, np.array([7]), key="other") == 0
    pool.clear()
    assert pool.nbytes == 0 and answer(model, pool, a, np.array([7])) == 0


def test_what_is_larger_than_all_memory_is_not_kept():
    model = Model("full")
    pool = PromptPool(50 * 2 * 2 * 2 * 4)
    answer(model, pool, np.arange(30), np.array([7]))
    assert pool.sequences == 1
    answer(model, pool, np.arange(100, 200), np.array([7]))
    assert pool.sequences == 1 and answer(model, pool, np.arange(30), np.array([7])) == 28


def test_a_copy_and_its_original_go_their_own_ways():
    for kind in KINDS:
        model = Model(kind)
        cache, ids = model.fresh(), np.arange(100)
        model.read(cache, ids[:50])
        states = layers.states_of(cache)
        model.read(cache, ids[50:])
        copy = layers.copied(cache, 50, states)
        other = np.arange(500, 540)
        model.read(copy, other)
        model.read(cache, other)
        model.check(copy, np.concatenate((ids[:50], other)))
        model.check(cache, np.concatenate((ids, other)))
        layers.cut(cache, 50, states)
        model.read(cache, other[:5])
        model.check(cache, np.concatenate((ids[:50], other[:5])))
