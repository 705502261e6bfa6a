"""``kt_cache: int8``: the cache of codes against transformers' own, which is given what the codes stand for; and models that keep it."""

from __future__ import annotations

import copy
import random

import pytest
import torch
from helpers.architectures import tiny_model
from helpers.chats import chat_model
from helpers.loading import ONE_ROW, load
from helpers.marks import needs_native
from helpers.models import ARCHITECTURES, make_model
from helpers.references import per_token, rel
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from llamafactory_kt import KTConfigError, optimize_for_inference
from llamafactory_kt.decoding import attention
from llamafactory_kt.decoding.quantized_cache import INT8, Int8Layer, Int8SlidingLayer
from llamafactory_kt.load_report import load_rows
from llamafactory_kt.model import growing_cache
from llamafactory_kt.model.growing_cache import GrowingLayer, GrowingSlidingLayer, let_grow, through_cache
from llamafactory_kt.native.coded_rows import STORED, CodedRows, decode, encode
from llamafactory_kt.tracing.chain import Chain

pytestmark = needs_native
WINDOW = 7
WIDTHS = 6, 9
NOISE = 0.04
"""of logits: what codes cost the tiny models here, whose heads have 16 values"""


def pair(kind: str) -> tuple[DynamicLayer, Int8Layer]:
    """transformers' layer, and one with codes."""
    made = [DynamicSlidingWindowLayer(sliding_window=WINDOW) if kind == "sliding" else DynamicLayer() for _ in range(2)]
    made[1].__class__ = Int8SlidingLayer if kind == "sliding" else Int8Layer
    return made[0], made[1]


def as_kept(states: torch.Tensor) -> torch.Tensor:
    return decode(encode(states), states.shape[-1], states.dtype)


def held(layer: DynamicLayer) -> list[torch.Tensor]:
    if isinstance(layer, Int8Layer):
        return [decode(t, width, torch.float32) for t, width in zip((layer.keys, layer.values), WIDTHS, strict=True)]
    return [layer.keys, layer.values]


@pytest.mark.parametrize("kind", ["full", "sliding"])
@pytest.mark.parametrize("seed", range(8))
def test_random_operations(kind, seed):
    """Bit for bit what transformers' layer holds that got the same rows as their codes stand for."""
    choose, numbers, both = random.Random(seed), torch.Generator().manual_seed(seed), pair(kind)
    batch = choose.choice([1, 2, 3])
    for step in range(50):
        length = both[0].get_seq_length()
        what = choose.choice([*["update"] * 8, "crop", "reorder", "select", "repeat", "copy"]) if length else "update"
        rows = torch.tensor([choose.randrange(batch) for _ in range(batch)])
        if what == "update":
            count = 300 if step == 20 else choose.randint(1, 5)
            given = [torch.randn(batch, 2, count, width, generator=numbers) for width in WIDTHS]
            if choose.random() < 0.5:
                given = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in given]
            with torch.inference_mode(choose.random() < 0.5):
                wanted, found = both[0].update(*map(as_kept, given)), both[1].update(*given)
            assert all(isinstance(t, CodedRows) and torch.equal(t + 0, w) for t, w in zip(found, wanted, strict=True))
        elif what == "crop" and length > 1 and (kind == "full" or length < WINDOW):
            fewer = choose.randint(1, length - 1)
            for layer in both:
                layer.crop(-fewer)
        elif what == "reorder":
            for layer in both:
                layer.reorder_cache(rows)
        elif what == "select":
            for layer in both:
                layer.batch_select_indices(rows)
        elif what == "repeat" and batch < 4:
            batch *= 2
            for layer in both:
                layer.batch_repeat_interleave(2)
        elif what == "copy":
            both = copy.deepcopy(both)
        stock, coded = both
        assert type(coded) is (Int8SlidingLayer if kind == "sliding" else Int8Layer) and coded.keys.dtype == STORED
        assert stock.get_seq_length() == coded.get_seq_length() and stock.get_mask_sizes(1) == coded.get_mask_sizes(1)
        assert all(torch.equal(a, b) for a, b in zip(held(stock), held(coded), strict=True))


def test_half_the_memory():
    grown, coded = (DynamicCache() for _ in range(2))
    let_grow(grown)
    let_grow(coded, INT8)
    for cache in (grown, coded):
        cache.update(*(torch.randn(1, 4, 2000, 128).bfloat16() for _ in range(2)), 0)
    sizes = [sum(t.untyped_storage().nbytes() for t in (c.layers[0].keys, c.layers[0].values)) for c in (grown, coded)]
    assert sizes[1] / sizes[0] == (128 + 4) / 256


@pytest.mark.parametrize("kind", ["full", "sliding"])
def test_what_cannot_be_encoded(kind):
    """Kept as it is, beside what has been encoded before: gradients, other dtypes, keys without values; and what recording asks for."""
    plain = GrowingSlidingLayer if kind == "sliding" else GrowingLayer
    first = [torch.randn(1, 2, 5, width) for width in WIDTHS]
    for name in ("gradients", "float64", "no values", "past"):
        stock, coded = pair(kind)
        stock.update(*map(as_kept, first)), coded.update(*first)
        given = [torch.randn(1, 2, 3, width) for width in WIDTHS]
        if name == "gradients":
            given[0].requires_grad_()
        elif name == "float64":
            given = [t.double() for t in given]
        elif name == "no values":
            stock, coded = pair(kind)
            given[1] = given[1][..., :0]
        elif not hasattr(DynamicSlidingWindowLayer, "activate_past_recording") or kind == "full":
            continue
        else:
            for layer in (stock, coded):
                layer.activate_past_recording()
            plain = DynamicSlidingWindowLayer
        wanted, found = stock.update(*given), coded.update(*given)
        assert type(coded) is plain and all(torch.equal(a, b) for a, b in zip(wanted, found, strict=True)), name
        if name == "gradients":
            found[0].sum().backward()
            assert given[0].grad is not None


def test_a_cache_that_holds_something_already():
    first, more = ([torch.randn(1, 2, count, width) for width in WIDTHS] for count in (5, 2))
    cache = DynamicCache()
    cache.update(*first, 0)
    let_grow(cache, INT8)
    found = cache.update(*more, 0)
    for kept, *given in zip(found, first, more, strict=True):
        assert torch.equal(kept + 0, torch.cat([as_kept(t) for t in given], 2))


def made(directory, architecture, **keys):
    path = directory / "model"
    if architecture in ARCHITECTURES:
        make_model(path, architecture, dtype=torch.float32)
    else:  # with a sliding window, and sinks
        tiny_model(architecture, sliding_window=6).save_pretrained(path)
    model = load(path, "native", dtype=torch.float32, **keys)
    optimize_for_inference(model)
    return model


@torch.inference_mode()
def step_by_step(model, count=8):
    """(their logits, tokens, cache), greedily."""
    keys = {"do_sample": False, "output_logits": True, "return_dict_in_generate": True, "min_new_tokens": count}
    found = model.generate(ONE_ROW, max_new_tokens=count, attention_mask=torch.ones_like(ONE_ROW), **keys)
    return torch.stack(found.logits, 1), found.sequences, found.past_key_values


@torch.inference_mode()
def at_once(model, tokens, count=8, cache=None):
    cache = DynamicCache(config=model.config) if cache is None else cache
    return model(tokens[:, :-1], past_key_values=cache).logits[:, -count:]


@pytest.mark.parametrize("architecture", ["qwen3_moe", "gpt_oss"])
def test_a_model(architecture, tmp_path, monkeypatch):
    """Token by token (recorded, too), the whole prompt at once, and attention that falls back to PyTorch's see the same keys."""
    model = made(tmp_path, architecture, cache="int8")
    assert ("Keys and values", "8 bits, with a scale for each head of a token") in load_rows(model)
    with pytest.MonkeyPatch.context() as patch:
        runs, stock = [], Chain.run
        patch.setattr(Chain, "run", lambda self, *given: (runs.append(len(self.programs)), stock(self, *given))[1])
        steps, tokens, cache = step_by_step(model)
        assert sum(runs) >= 4 * model.config.num_hidden_layers, "recorded"
        patch.setattr(Chain, "fits", lambda self, *given: False)
        count = len(runs)
        usual, same_tokens, _ = step_by_step(model)
        assert len(runs) == count and torch.equal(tokens, same_tokens)
    assert rel(steps, usual) < 1e-3
    assert all(isinstance(layer, Int8Layer) and layer.keys.dtype == STORED for layer in cache.layers)
    whole = at_once(model, tokens)
    assert per_token(steps, whole) < NOISE / 4
    floats = at_once(model, tokens, cache=DynamicCacheOfFloats(config=model.config))
    assert 1e-4 < per_token(whole, floats) < NOISE, "what codes cost"
    monkeypatch.setattr(attention, "view", lambda *given: None)
    assert per_token(at_once(model, tokens), whole) < 1e-3
    two_beams = model.generate(ONE_ROW, attention_mask=torch.ones_like(ONE_ROW), num_beams=2, max_new_tokens=4)
    assert two_beams.shape[1] > ONE_ROW.shape[1]


class DynamicCacheOfFloats(DynamicCache):
    """One that nobody encodes."""

    def __init__(self, config):
        super().__init__(config=config)
        vars(self)["_kt_grows"] = True


def test_latents_stay(tmp_path):
    model = made(tmp_path, "deepseek_v2", cache="int8")
    assert ("Keys and values", "latents, which stay as they are") in load_rows(model)
    steps, tokens, cache = step_by_step(model)
    assert all(type(layer) is GrowingLayer and layer.keys.shape[1] == 1 for layer in cache.layers)
    assert per_token(steps, at_once(model, tokens)) < 1e-4


def test_refused(tmp_path, monkeypatch):
    path = make_model(tmp_path / "model", "mixtral")
    with pytest.raises(
        KTConfigError, match=r"cache: unknown value 'int9', expected one of same, int8; did you mean int8\?"
    ):
        load(path, cache="int9")
    monkeypatch.setenv("LLAMAFACTORY_KT_WITHOUT", growing_cache.INTERNAL.name)
    with pytest.raises(KTConfigError, match=r"cache: int8 needs a version of transformers .* Set kt_cache: same"):
        load(path, cache="int8")


def test_a_chat(tmp_path):
    """Through LLaMA-Factory."""
    pytest.importorskip("llamafactory")
    chat = chat_model(
        make_model(tmp_path / "model", "qwen3_moe"), kt_backend="native", kt_cache="INT8", max_new_tokens=6
    )
    (answer,) = chat.chat([{"role": "user", "content": "Hello"}])
    assert 0 < answer.response_length <= 6
    assert "8 bits, with a scale for each head of a token" in dict(load_rows(chat.engine.model)).values()


def test_quality_is_measured_through_the_cache(tmp_path):
    """Not as a call without a cache, which encodes nothing."""
    model = made(tmp_path, "qwen3_moe", cache="int8")
    with torch.inference_mode():
        found, floats = (model(ONE_ROW, **keys).logits for keys in (through_cache(model), {"use_cache": False}))
    assert 1e-4 < per_token(found, floats) < NOISE
