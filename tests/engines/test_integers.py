"""INT8 and INT4: a layer and a model against float sums on the weights that the codes stand for."""

from __future__ import annotations

import pytest
import torch
from helpers.adapters import make_adapter
from helpers.experts import batch, layer, lora_for, make_engine, reference
from helpers.loading import answer, load
from helpers.marks import needs_native
from helpers.models import make_model, stock_class
from helpers.references import merged_float32, per_token, rel

from llamafactory_kt import KTModelError, apply_adapter
from llamafactory_kt.adapters import ExpertsShape
from llamafactory_kt.checkpoint.expert_weights import LayerWeights
from llamafactory_kt.engines.options import DEFAULT_OPTIONS
from llamafactory_kt.engines.registry import get_engine
from llamafactory_kt.model.state import kt_state

pytestmark = [needs_native, pytest.mark.usefixtures("worker_threads")]
INTEGERS = ["INT8", "INT4"]


def decoded(engine, dtype=torch.float64) -> LayerWeights:
    """The weights that an engine's codes stand for."""
    experts = engine._weights
    return LayerWeights(
        *(torch.stack([getattr(e, p).dequantize(dtype) for e in experts]) for p in ("gate", "up", "down"))
    )


@pytest.mark.parametrize("kind", INTEGERS)
@pytest.mark.parametrize("shape", [ExpertsShape(5, 64, 96), ExpertsShape(6, 72, 40), ExpertsShape(4, 130, 18)], ids=str)
@pytest.mark.parametrize("tokens", [1, 5, 60])
def test_base_and_lora_against_float64(kind, shape, tokens):
    weights, lora = layer(shape), lora_for(shape, rank=5, scaling=3.2)
    engine = make_engine(kind, shape, weights, rank=5, scaling=3.2)
    x, index, scores = batch(shape, tokens)
    own = decoded(engine)
    wanted = reference(own, None, x, index, scores), reference(own, lora, x, index, scores)
    base = engine.forward(x, index, scores)
    engine.set_lora(lora)
    whole = engine.forward(x, index, scores)
    assert rel(base, wanted[0]) < 0.01 and rel(whole, wanted[1]) < 0.01
    assert rel(whole.double() - base.double(), wanted[1] - wanted[0]) < 0.015
    assert engine.nbytes == engine.memory(shape, 5, 2, DEFAULT_OPTIONS).weights


@pytest.mark.parametrize(("kind", "bound", "share"), [("INT8", 0.01, 0.54), ("INT4", 0.15, 0.29)])
def test_what_a_layer_loses(kind, bound, share):
    """Of the output's norm, with gaussian weights; and of the memory."""
    shape = ExpertsShape(6, 256, 192)
    weights = layer(shape)
    engine = make_engine(kind, shape, weights)
    given = batch(shape, 40)
    assert 0.5 * bound < rel(engine.forward(*given), reference(weights, None, *given)) < bound
    assert engine.nbytes < share * sum(part.nbytes for part in (weights.gate, weights.up, weights.down))


@pytest.mark.parametrize("kind", INTEGERS)
def test_a_weight_that_is_not_finite(kind):
    shape = ExpertsShape(5, 64, 96)
    weights = layer(shape)
    weights.up[3, 2, 1] = torch.nan
    with pytest.raises(KTModelError, match=r"Expert 3 of layer 0 has values that are not finite\. Download"):
        make_engine(kind, shape, weights)


def test_auto_keeps_precision():
    assert not any(get_engine(kind).auto(merged) for kind in INTEGERS for merged in (True, False))


@pytest.mark.parametrize("kind", INTEGERS)
def test_a_model_with_lora_against_float32(kind, tmp_path):
    """As near to a float32 sum on the decoded weights as stock bfloat16 is to one on its own."""
    path = make_model(tmp_path / "model", "qwen3_moe")
    adapter = make_adapter(tmp_path / "adapter", path, rank=4)
    model, _ = apply_adapter(load(path, backend=kind, adapter=str(adapter)), str(adapter))
    stock = stock_class(path).from_pretrained(path, dtype=torch.float32)
    for number, wrapper in enumerate(kt_state(model).wrappers):
        own, experts = decoded(wrapper.engine, torch.float32), stock.model.layers[number].mlp.experts
        experts.gate_up_proj.data = torch.cat([own.gate, own.up], 1)
        experts.down_proj.data = own.down
    stock.save_pretrained(tmp_path / "decoded")
    wanted = answer(merged_float32(tmp_path / "decoded", adapter)), answer(merged_float32(tmp_path / "decoded", None))
    bf16 = answer(merged_float32(tmp_path / "decoded", adapter, dtype=torch.bfloat16))
    found = answer(model)
    assert per_token(found, wanted[0]) < 1.5 * per_token(bf16, wanted[0])
    assert rel(wanted[0], wanted[1]) > 0.3
    if kind == "INT4":  # eight bits lose less than bfloat16 does
        assert rel(answer(merged_float32(path, adapter)), wanted[0]) > 2 * rel(found, wanted[0])
