"""The oneDNN engine, one layer at a time, compared with a float64 sum."""

from __future__ import annotations

import gc
from pathlib import Path

import pytest
import torch
from helpers.experts import batch, layer, lora_for, make_engine, reference
from helpers.marks import needs_bfloat16_kernels, needs_onednn
from helpers.packing import pretend_no_bfloat16_kernels
from helpers.references import rel

from llamafactory_kt.adapters import ExpertsShape
from llamafactory_kt.checkpoint.reader import ExpertWeights
from llamafactory_kt.engines.base import EngineSpec
from llamafactory_kt.engines.onednn import engine as onednn_engine
from llamafactory_kt.engines.onednn import schedule
from llamafactory_kt.engines.onednn.engine import OneDNNEngine, sampled
from llamafactory_kt.ground.paging import give_back_memory
from llamafactory_kt.matmul import column_tiles, linear
from llamafactory_kt.matmul.openmp import in_team
from llamafactory_kt.tools.process_memory import peak_resident_memory, resident_memory


@pytest.fixture
def placed(monkeypatch):
    """The sizes of the weights that the engine packs."""
    stock, sizes = onednn_engine.placing, set()

    def placing(size, count, packed):
        if packed:
            sizes.add(size)
        return stock(size, count, packed)

    monkeypatch.setattr(onednn_engine, "placing", placing)
    return sizes


@needs_onednn
@pytest.mark.parametrize(
    "packed", [set(), *(pytest.param({size}, marks=needs_bfloat16_kernels) for size in [(14, 33), (33, 7)])], ids=str
)
def test_onednn_with_weights_that_are_not_packed(monkeypatch, placed, packed):
    monkeypatch.setattr(onednn_engine, "faster_packed", lambda sizes, sample: packed & set(sizes))
    shape = ExpertsShape(4, 33, 7)
    weights, lora, given = layer(shape), lora_for(shape, rank=5, scaling=3.2), batch(shape, 37)
    engine = make_engine("oneDNN", shape, weights)
    assert rel(engine.forward(*given), reference(weights, None, *given)) < 0.01
    engine.set_lora(lora)
    assert rel(engine.forward(*given), reference(weights, lora, *given)) < 0.01
    assert placed == packed


@needs_onednn
@pytest.mark.parametrize("packed", [set(), {(32, 48)}, {(48, 16)}], ids=str)
def test_onednn_without_bfloat16_kernels(monkeypatch, placed, packed):
    """Experts with few and with many rows, plain or in column tiles."""
    pretend_no_bfloat16_kernels(monkeypatch)
    monkeypatch.setattr(onednn_engine, "faster_packed", lambda sizes, sample: packed & set(sizes))
    monkeypatch.setattr(column_tiles, "WIDTH", 16)
    shape = ExpertsShape(7, 48, 16)
    weights, lora, (x, index, scores) = layer(shape), lora_for(shape, rank=5, scaling=3.2), batch(shape, 37)
    index[index == 6] = 2
    index[:30, 0], index[:3, 1] = 3, 6
    rows = torch.bincount(index.flatten(), minlength=7)
    assert min(rows) < linear.FEW_ROWS < max(rows)
    engine = make_engine("oneDNN", shape, weights)
    assert placed == packed
    assert rel(engine.forward(x, index, scores), reference(weights, None, x, index, scores)) < 0.01
    engine.set_lora(lora)
    assert rel(engine.forward(x, index, scores), reference(weights, lora, x, index, scores)) < 0.01


@needs_onednn
@pytest.mark.parametrize("packed", [True, False])
def test_onednn_without_bfloat16_kernels_rounds_nothing_between_products(monkeypatch, packed):
    """Every expert has many rows, and the caller takes float32."""
    pretend_no_bfloat16_kernels(monkeypatch)
    monkeypatch.setattr(column_tiles, "WIDTH", 16)
    monkeypatch.setattr(onednn_engine, "faster_packed", lambda sizes, sample: {size for size in sizes if packed})
    shape = ExpertsShape(3, 48, 8)
    weights, lora, (x, index, scores) = layer(shape), lora_for(shape, rank=5, scaling=3.2), batch(shape, 37)
    assert torch.bincount(index.flatten(), minlength=3).min() >= linear.FEW_ROWS
    engine = make_engine("oneDNN", shape, weights)
    for one in (None, lora):
        engine.set_lora(one)
        assert rel(engine.forward(x.float(), index, scores), reference(weights, one, x, index, scores)) < 1e-5


@pytest.fixture
def two_threads():
    """Tests that run in parallel have one thread each otherwise."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@needs_onednn
@pytest.mark.parametrize("kernels", [pytest.param(True, marks=needs_bfloat16_kernels), False])
@pytest.mark.parametrize("kept", [1, 30, 10**6])
@pytest.mark.parametrize("alone", [True, False])
def test_onednn_computes_experts_side_by_side(monkeypatch, two_threads, alone, kept, kernels):
    """Each thread an expert, or all threads together; results are added up one expert at a time, a few at a time, or
    all at once."""
    if not kernels:
        pretend_no_bfloat16_kernels(monkeypatch)
    shape = ExpertsShape(7, 33, 8)
    monkeypatch.setattr(onednn_engine, "RESULTS", kept * 4 * shape.hidden_size)
    monkeypatch.setattr(schedule, "FEWEST_ROWS", 7)
    # private: with so few parts, how many experts there are would decide
    monkeypatch.setattr(schedule, "_BUSY", 0.0 if alone else 2.0)
    weights, lora, (x, index, scores) = layer(shape), lora_for(shape, rank=5, scaling=3.2), batch(shape, 37)
    index[:30, 0] = 3  # most tokens choose this expert (some of them twice), and none the last one
    index[index == 6] = 2
    teams = []
    monkeypatch.setattr(schedule, "in_team", lambda *given: teams.append(given) or in_team(*given))
    engine = make_engine("oneDNN", shape, weights)
    assert rel(engine.forward(x, index, scores), reference(weights, None, x, index, scores)) < 0.01
    engine.set_lora(lora)
    assert rel(engine.forward(x, index, scores), reference(weights, lora, x, index, scores)) < 0.01
    assert bool(teams) == alone


MB = 2**20


@needs_onednn
@pytest.mark.parametrize("packed", [True, False])
def test_onednn_takes_one_expert_at_a_time(packed, monkeypatch):
    """Loading takes no more than the weights, one expert, and the experts that are timed."""
    monkeypatch.setattr(onednn_engine, "faster_packed", lambda sizes, sample: {size for size in sample() if packed})
    shape, least = ExpertsShape(64, 1024, 1024), 384 * MB
    one = layer(ExpertsShape(1, 1024, 1024))

    def read(dtype):
        for _ in range(shape.num_experts):
            yield ExpertWeights(one.gate[0].clone(), one.up[0].clone(), one.down[0].clone())

    def load() -> OneDNNEngine:
        engine = OneDNNEngine(EngineSpec(0, shape, 3, 0), read)
        engine.load()
        return engine

    load()
    gc.collect()
    give_back_memory()
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError as error:
        pytest.skip(f"this system does not forget the most memory there was: {error}")
    before = resident_memory()
    engine = load()
    assert least < peak_resident_memory() - before < least + 4 * sampled(shape) * 6 * MB, "as MemoryNeed has it"
    assert engine.nbytes == least
