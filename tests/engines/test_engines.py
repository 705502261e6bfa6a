"""What every engine does, one layer at a time, compared with a float64 sum."""

from __future__ import annotations

import pytest
import torch
from helpers.experts import batch, layer, lora_for, make_engine, reference
from helpers.marks import ENGINES
from helpers.references import rel

from llamafactory_kt.adapters import ExpertsShape

pytestmark = pytest.mark.usefixtures("worker_threads")


@pytest.mark.parametrize("kind", ENGINES)
@pytest.mark.parametrize("shape", [ExpertsShape(5, 64, 96), ExpertsShape(6, 72, 40), ExpertsShape(4, 33, 7)], ids=str)
@pytest.mark.parametrize("tokens", [1, 16, 37])
def test_base_and_lora_against_float64(kind, shape, tokens):
    """Sizes the kernel takes and sizes it would crash on; fewer tokens than a chunk, exactly as many, and more."""
    weights, lora = layer(shape), lora_for(shape, rank=5, scaling=3.2)
    engine = make_engine(kind, shape, weights, rank=5, scaling=3.2)
    x, index, scores = batch(shape, tokens)
    wanted = reference(weights, None, x, index, scores), reference(weights, lora, x, index, scores)
    base = engine.forward(x, index, scores)
    engine.set_lora(lora)
    whole = engine.forward(x, index, scores)
    assert base.shape == x.shape and base.dtype == x.dtype
    assert rel(base, wanted[0]) < 0.01
    assert rel(whole, wanted[1]) < 0.01
    assert rel(whole.double() - base.double(), wanted[1] - wanted[0]) < 0.015
    assert rel(wanted[1], wanted[0]) > 0.5


@pytest.mark.parametrize("kind", ENGINES)
def test_another_lora_of_any_rank_and_back_to_the_base(kind):
    shape = ExpertsShape(5, 64, 96)
    weights = layer(shape)
    engine = make_engine(kind, shape, weights, rank=8, scaling=2.0)
    x, index, scores = batch(shape, 20)
    for seed, (rank, scaling) in enumerate([(8, 2.0), (1, 16.0), (3, 1.7), (64, 0.5), (2, 2.0)]):
        lora = lora_for(shape, rank, scaling, seed)
        engine.set_lora(lora)
        assert rel(engine.forward(x, index, scores), reference(weights, lora, x, index, scores)) < 0.01, (rank, scaling)
    engine.set_lora(None)
    fresh = make_engine(kind, shape, weights)
    assert torch.equal(engine.forward(x, index, scores), fresh.forward(x, index, scores)), (
        "the old LoRA must be gone, exactly"
    )
