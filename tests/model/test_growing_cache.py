"""The cache that grows in place, against transformers' own: bit for bit after each of many random operations."""

from __future__ import annotations

import copy
import random

import pytest
import torch
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from llamafactory_kt.model.growing_cache import GrowingLayer, GrowingSlidingLayer, let_grow

WINDOW = 7


def crops_to() -> bool:
    """Whether crop() takes what is left; later versions of transformers take what goes, negative."""
    layer = DynamicLayer()
    layer.update(torch.zeros(1, 1, 3, 2), torch.zeros(1, 1, 3, 2))
    try:
        layer.crop(2)
    except ValueError:
        return False
    return True


CROPS_TO = crops_to()


def pair(kind: str) -> tuple[DynamicLayer, DynamicLayer]:
    """transformers' layer, and one that grows."""
    made = [DynamicSlidingWindowLayer(sliding_window=WINDOW) if kind == "sliding" else DynamicLayer() for _ in range(2)]
    made[1].__class__ = GrowingSlidingLayer if kind == "sliding" else GrowingLayer
    return made[0], made[1]


class Walk:
    """Random operations on both."""

    def __init__(self, kind: str, seed: int):
        self.random, self.tensors = random.Random(seed), torch.Generator().manual_seed(seed)
        self.kind, self.batch, self.both = kind, self.random.choice([1, 2, 3]), pair(kind)
        self.others: list[tuple[DynamicLayer, DynamicLayer]] = []

    def update(self, most: int = 5) -> None:
        rows = self.random.randint(1, most)
        given = [torch.randn(self.batch, 2, rows, width, generator=self.tensors) for width in (4, 3)]
        if self.random.random() < 0.5:
            given = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in given]
        with torch.inference_mode(self.random.random() < 0.5):
            stock, grown = (layer.update(*given) for layer in self.both)
        assert all(torch.equal(a, b) for a, b in zip(stock, grown, strict=True))

    def prompt(self) -> None:
        self.update(400)

    def crop(self) -> None:
        held = self.both[0].get_seq_length()
        if (self.kind == "sliding" and held >= WINDOW) or held < 2:
            return
        left = self.random.randint(1, held - 1)
        for layer in self.both:
            layer.crop(left if CROPS_TO else left - held)

    def reorder(self) -> None:
        beams = torch.tensor([self.random.randrange(self.batch) for _ in range(self.batch)])
        for layer in self.both:
            layer.reorder_cache(beams)

    def select(self) -> None:
        rows = torch.tensor([self.random.randrange(self.batch) for _ in range(self.random.randint(1, 3))])
        if self.both[0].get_seq_length():
            self.batch = len(rows)
            for layer in self.both:
                layer.batch_select_indices(rows)

    def repeat(self) -> None:
        if self.both[0].get_seq_length() and self.batch < 4:
            self.batch *= 2
            for layer in self.both:
                layer.batch_repeat_interleave(2)

    def copy(self) -> None:
        """The copy goes on; what the original gets afterwards must not show."""
        copied = self.random.choice([copy.copy, copy.deepcopy])
        before, self.both = self.both, tuple(map(copied, self.both))
        self.others.append(before)
        if before[0].get_seq_length():
            more = [torch.randn(before[0].keys.shape[0], 2, 2, width, generator=self.tensors) for width in (4, 3)]
            for layer in before:
                layer.update(*more)

    def reset(self) -> None:
        with torch.inference_mode():  # it may change tensors in place that were made so
            for layer in self.both:
                layer.reset()

    def check(self) -> None:
        stock, grown = self.both
        assert stock.get_seq_length() == grown.get_seq_length() and stock.get_mask_sizes(1) == grown.get_mask_sizes(1)
        if stock.get_seq_length():
            for stock, grown in (self.both, *self.others):
                assert torch.equal(stock.keys, grown.keys) and torch.equal(stock.values, grown.values)


OPERATIONS = [*["update"] * 12, "prompt", "crop", "crop", "reorder", "select", "repeat", "copy"]
"""with a reset now and then"""


@pytest.mark.parametrize("kind", ["full", "sliding"])
@pytest.mark.parametrize("seed", range(20))
def test_random_operations(kind, seed):
    walk = Walk(kind, seed)
    walk.prompt()
    for _ in range(60):
        getattr(walk, "reset" if walk.random.random() < 0.01 else walk.random.choice(OPERATIONS))()
        walk.check()


@pytest.mark.parametrize("kind", ["full", "sliding"])
def test_far_beyond_the_window(kind):
    """Token by token: memory is taken seldom, and a window's does not grow."""
    stock, grown = pair(kind)
    places = set()
    for _ in range(1500):
        given = torch.randn(1, 1, 1, 4), torch.randn(1, 1, 1, 4)
        wanted, found = stock.update(*given), grown.update(*given)
        assert torch.equal(wanted[0], found[0]) and torch.equal(wanted[1], found[1])
        places.add(grown.keys.untyped_storage().data_ptr())
        assert grown.keys.untyped_storage().nbytes() <= 4 * 4 * (4 * (grown.keys.shape[-2] + 1) + 1024)
    assert len(places) <= (4 if kind == "full" else 8)


def test_memory_of_what_was_cropped_is_given_back():
    _, grown = pair("full")
    grown.update(torch.randn(1, 1, 50_000, 4), torch.randn(1, 1, 50_000, 4))
    grown.crop(10 if CROPS_TO else 10 - 50_000)
    grown.update(torch.randn(1, 1, 1, 4), torch.randn(1, 1, 1, 4))
    assert grown.keys.untyped_storage().nbytes() < 50_000


@pytest.mark.parametrize(
    "wrong", [{"batch": 1}, {"heads": 3}, {"width": 5}, {"dtype": torch.bfloat16}, {"rows": 0}, {"dtype": torch.float64}], ids=str
)  # fmt: skip
def test_what_does_not_fit(wrong):
    """As transformers has it: an error, or the wider dtype, but never another sequence's rows."""
    given = {"batch": 2, "heads": 2, "rows": 1, "width": 4, "dtype": torch.float32} | wrong
    new = torch.randn(given["batch"], given["heads"], given["rows"], given["width"]).to(given["dtype"])
    said = []
    for layer in pair("full"):
        layer.update(*(torch.ones(2, 2, 3, 4),) * 2)
        try:
            said.append(layer.update(new, new)[0])
        except RuntimeError as error:
            said.append(str(error).split(" but ")[0])
    one, other = said
    assert type(one) is type(other)
    assert (one == other) if isinstance(one, str) else torch.equal(one, other) and one.dtype == other.dtype


def test_a_cache_that_holds_something_already():
    """It grows from there, with transformers' class untouched."""
    stock, grown = DynamicCache(), DynamicCache()
    given = [torch.randn(1, 2, 5, 4) for _ in range(4)]
    for cache in (stock, grown):
        cache.update(given[0], given[1], 0)
    let_grow(grown)
    for layer in (0, 1, 0, 1):
        wanted, found = (cache.update(given[2], given[3], layer) for cache in (stock, grown))
        assert all(torch.equal(a, b) for a, b in zip(wanted, found, strict=True))
    assert {type(layer) for layer in grown.layers} == {GrowingLayer} and type(stock.layers[0]) is DynamicLayer


@pytest.mark.skipif(not hasattr(DynamicSlidingWindowLayer, "activate_past_recording"), reason="since transformers 5.24")
def test_a_window_that_remembers_what_it_drops():
    """As assisted generation asks of it, also while it grows."""
    both = pair("sliding")
    for number in range(20):
        given = torch.randn(1, 1, 3, 4), torch.randn(1, 1, 3, 4)
        if number == 5:
            for layer in both:
                layer.activate_past_recording()
        wanted, found = (layer.update(*given) for layer in both)
        assert all(torch.equal(a, b) for a, b in zip(wanted, found, strict=True))
        if number >= 5:
            for layer in both:
                layer.crop(-2)
            assert torch.equal(both[0].keys, both[1].keys)
