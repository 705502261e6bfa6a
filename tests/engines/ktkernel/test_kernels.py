"""kt-kernel's kernels, one layer at a time, compared with a float64 sum."""

from __future__ import annotations

import threading

import pytest
import torch
from helpers.experts import batch, layer, lora_for, make_engine, reference
from helpers.marks import needs_base_kernel, needs_kernel
from helpers.references import rel

from llamafactory_kt.adapters import ExpertsShape

pytestmark = pytest.mark.usefixtures("worker_threads")


@needs_kernel
def test_threads_take_turns_in_the_kernel():
    shape = ExpertsShape(5, 64, 96)
    engine = make_engine("AMXBF16", shape, layer(shape))
    cases = [batch(shape, 8, seed) for seed in range(8)]
    wanted = [engine.forward(*case) for case in cases]
    found = [[] for _ in cases]

    def work(number):
        for _ in range(50):
            found[number].append(engine.forward(*cases[number]))

    threads = [threading.Thread(target=work, args=(n,)) for n in range(len(cases))]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert all(torch.equal(out, wanted[n]) for n in range(len(cases)) for out in found[n])


@needs_base_kernel
@pytest.mark.parametrize("shape", [ExpertsShape(5, 64, 96), ExpertsShape(6, 72, 40), ExpertsShape(4, 33, 7)], ids=str)
@pytest.mark.parametrize("tokens", [1, 16, 37])
def test_the_base_kernel_against_float64(shape, tokens):
    """Sizes it takes and sizes it would crash on; fewer tokens than a chunk, exactly as many, and more."""
    weights = layer(shape)
    engine = make_engine("AVX2BF16", shape, weights, rank=0)
    x, index, scores = batch(shape, tokens)
    found = engine.forward(x, index, scores)
    assert found.shape == x.shape and rel(found, reference(weights, None, x, index, scores)) < 0.01


# Errors on random weights, which have no outliers and no structure; LoRA is bf16 in all of them.
BOUNDS = {"AMXINT8": 0.03, "AMXINT4": 0.25}


@needs_kernel
@pytest.mark.parametrize("shape", [ExpertsShape(5, 128, 256), ExpertsShape(6, 72, 40)], ids=str)
@pytest.mark.parametrize("tokens", [1, 37])
def test_int4_against_float64(shape, tokens):
    weights, lora = layer(shape), lora_for(shape, rank=5, scaling=3.2)
    engine = make_engine("AMXINT4", shape, weights, rank=5, scaling=3.2)
    compare(engine, weights, lora, shape, tokens, "AMXINT4")


def compare(engine, weights, lora, shape, tokens, method):
    """The base and the whole are compared with float64, LoRA's effect with its effect on the same base weights."""
    x, index, scores = batch(shape, tokens)
    base = engine.forward(x, index, scores).double()
    engine.set_lora(lora)
    whole = engine.forward(x, index, scores).double()
    wanted = reference(weights, None, x, index, scores), reference(weights, lora, x, index, scores)
    assert rel(base, wanted[0]) < BOUNDS[method]
    assert rel(whole, wanted[1]) < BOUNDS[method]
    effect = wanted[1] - wanted[0]
    assert torch.cosine_similarity((whole - base).flatten(), effect.flatten(), dim=0) > 0.99
    assert rel(wanted[1], wanted[0]) > 0.5
