"""Where a forward's time goes: which calls belong to which part, on a clock that ticks once each time it is read."""

from __future__ import annotations

import contextlib
import itertools

import pytest
import torch
from helpers.adapters import make_adapter
from helpers.loading import ONE_ROW, load, logits
from helpers.models import make_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from llamafactory_kt import apply_adapter, optimize_for_inference
from llamafactory_kt.native.library import library
from llamafactory_kt.tools.bench import parts
from llamafactory_kt.tools.bench.parts import operations_of, parts_of

LAYERS = 3


@pytest.fixture
def ticks(monkeypatch):
    """A call that is timed takes one second, so seconds are calls; calls inside of it do not look at the clock."""
    clock = itertools.count()
    monkeypatch.setattr(parts.time, "perf_counter", lambda: next(clock))


def forwards(model) -> list:
    return [vars(module).get("forward") for module in model.modules()]


@pytest.mark.parametrize("optimized", [False, True])
def test_each_call_belongs_to_one_part(tmp_path, ticks, optimized):
    path = make_model(tmp_path / "model", "deepseek_v2")
    adapter = make_adapter(tmp_path / "adapter", path)
    model, _ = apply_adapter(load(path, "torch", adapter=[str(adapter)]), adapter)
    if optimized:
        optimize_for_inference(model)
    wanted, own = logits(model), forwards(model)
    with parts_of(model) as times:
        assert torch.equal(logits(model), wanted)
    attention, mlp = LAYERS * 4, LAYERS * 3  # the first layer is dense, the others have shared experts
    assert times.seconds == {"attention": LAYERS, "linear": attention + mlp, "experts": LAYERS - 1, "output": 1}
    before = times.seconds
    assert torch.equal(logits(model), wanted) and times.seconds == before, "wrapped while it is timed, and no longer"
    assert forwards(model) == own
    assert "get_interface" not in vars(ALL_ATTENTION_FUNCTIONS)


def test_what_a_part_calls_is_its_own(tmp_path, ticks, monkeypatch):
    """On a GPU, for one, routed experts have the shared ones computed meanwhile."""
    model = load(make_model(tmp_path / "model", "qwen3_moe"), "torch")
    layer = model.model.layers[1]
    stock = layer.mlp.experts.engine.forward

    def forward(*given):
        layer.self_attn.q_proj(given[0])
        return stock(*given)

    monkeypatch.setattr(layer.mlp.experts.engine, "forward", forward)
    with parts_of(model) as times:
        logits(model)
    assert times.seconds == {"attention": LAYERS, "linear": LAYERS * 4, "experts": LAYERS, "output": 1}


def test_a_stock_model_with_eager_attention(tmp_path, ticks):
    path = make_model(tmp_path / "model", "qwen3_moe")
    model = AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager")
    hooked = model.model.layers[1].self_attn.o_proj
    hooked.forward = own = hooked.forward  # as accelerate's hooks do
    with parts_of(model) as times:
        logits(model)
    assert times.seconds == {"attention": LAYERS, "linear": LAYERS * 4, "experts": LAYERS, "output": 1}
    assert vars(hooked)["forward"] is own


@pytest.mark.skipif(isinstance(library(), str), reason="the native kernels are not here")
def test_layers_that_compute_a_token_as_a_program(tmp_path, ticks):
    """Their modules are not called, so the kernels tell the time; on a prompt they are."""
    path = make_model(tmp_path / "model", "qwen3_moe")
    model = load(path, "native")
    optimize_for_inference(model)
    with torch.inference_mode():
        cache = model(ONE_ROW).past_key_values
        for _ in range(5):
            model(ONE_ROW[:, :1], past_key_values=cache)
        with parts_of(model) as times:
            model(ONE_ROW[:, :1], past_key_values=cache)
        found = times.seconds
        model(ONE_ROW[:, :1], past_key_values=cache)
    assert times.calls == {"output": 1} and found["output"] == 1
    assert all(0 < found[part] < 1 for part in ("attention", "linear", "experts"))
    assert times.seconds == found, "no longer"
    with parts_of(model) as times:
        logits(model)
    assert times.seconds == {"attention": LAYERS, "linear": LAYERS * 4, "experts": LAYERS, "output": 1}


@pytest.mark.skipif(isinstance(library(), str), reason="the native kernels are not here")
def test_timing_changes_nothing_about_latent_attention(tmp_path, ticks):
    """Its cache stays small, what it multiplies without a module is linear, and its tokens stay programs."""
    model = load(make_model(tmp_path / "model", "deepseek_v2"), "native")
    optimize_for_inference(model)

    def ask(ids, cache, measured):
        with torch.inference_mode(), measured(model) as found:
            return model(ids, past_key_values=cache).past_key_values, found

    cache, operations = ask(ONE_ROW, None, operations_of)
    assert operations["attention"] > 0 and operations["linear"] > 0
    token = ONE_ROW[:, :1]
    for ids, products in ((ONE_ROW, 1), (token, 2)):  # keys and values of all heads; or their queries and sums
        cache, times = ask(ids, cache, parts_of)
        assert {layer.keys.shape[1] for layer in cache.layers} == {1}
        wanted = {"attention": LAYERS, "linear": LAYERS * (6 + products), "experts": LAYERS - 1, "output": 1}
        assert times.calls == wanted
    for _ in range(5):
        ask(token, cache, contextlib.nullcontext)
    assert ask(token, cache, parts_of)[1].calls == {"output": 1}


@pytest.mark.parametrize("queries", [1, 38])
def test_operations_are_those_that_torch_counts(tmp_path, queries):
    """torch counts the products that are computed; eager attention also computes what is masked."""
    path = make_model(tmp_path / "model", "deepseek_v2", dtype=torch.float32)
    stock = AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager", experts_implementation="eager")
    ids = torch.arange(2, 2 + queries)[None]
    with torch.inference_mode(), FlopCounterMode(display=False) as flops:
        stock(ids)
    counts = {name: sum(count.values()) for name, count in flops.get_flop_counts().items()}

    def total(end: str) -> int:
        return sum(count for name, count in counts.items() if name.endswith(end))

    linear_and_attention = total(".self_attn") + total(".mlp.shared_experts") + total(".layers.0.mlp")
    attention = sum(4 * size * queries * queries * 2 for size in (24, 16)) * LAYERS
    for model in (stock, load(path, "torch", dtype=torch.float32)):
        with torch.inference_mode(), operations_of(model) as counted:
            model(ids)
        assert counted["output"] == total("lm_head") and counted["experts"] == total(".mlp.experts")
        assert counted["linear"] + attention == linear_and_attention
        assert counted["attention"] == attention * (queries + 1) / (2 * queries)


@pytest.mark.parametrize(
    ("options", "pairs"), [({}, 8 + 9 + 10), ({"sliding_window": 4}, 12), ({"is_causal": False}, 30)]
)
def test_operations_of_the_last_queries(options, pairs):
    query, key, value = torch.zeros(2, 4, 3, 8), torch.zeros(2, 2, 10, 8), torch.zeros(2, 2, 10, 5)
    found = parts._attention_operations(torch.nn.Module(), query, key, value, None, **options)
    assert found == 2 * 4 * pairs * 2 * (8 + 5), "a batch of 2 with 4 heads"
