"""Nothing that a stream's tasks may still read is changed or freed."""

from __future__ import annotations

import gc

import pytest
import torch
from helpers.experts import batch, layer, lora_for, make_engine
from helpers.marks import needs_base_kernel, needs_kernel
from helpers.streams import LateStream, LateWorkers

from llamafactory_kt.adapters import ExpertsShape
from llamafactory_kt.engines import streams
from llamafactory_kt.engines.ktkernel import sft_engine

SHAPE = ExpertsShape(5, 40, 24)
KERNELS = [pytest.param("AVX2BF16", marks=needs_base_kernel), pytest.param("AMXBF16", marks=needs_kernel)]

pytestmark = pytest.mark.usefixtures("worker_threads")


@needs_kernel
def test_lora_is_exchanged_when_nothing_computes_with_it(monkeypatch):
    engine, log = make_engine("AMXBF16", SHAPE, layer(SHAPE)), []
    monkeypatch.setattr(sft_engine, "wait_for_streams", lambda: log.append("wait"))
    set_lora = type(engine.kernel).set_lora
    monkeypatch.setattr(type(engine.kernel), "set_lora", lambda *given: (log.append("set"), set_lora(*given)))
    undo = engine.set_lora(lora_for(SHAPE, 4, 1.0))
    assert log == ["wait", "set"]
    undo()
    assert log == ["wait", "set"] * 2


@pytest.mark.parametrize("kind", KERNELS)
def test_a_kernel_is_freed_when_nothing_computes_with_it(monkeypatch, kind):
    waited, late = [], LateStream()
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
    monkeypatch.setattr(streams, "_devices", set())  # what other tests have submitted for is no affair of this one's
    engine = make_engine(kind, SHAPE, layer(SHAPE))
    monkeypatch.setattr(type(engine.kernel), "infer", LateWorkers(engine.kernel.infer, late))
    hidden, index, weights = batch(SHAPE, 3)
    x = torch.zeros(3, engine.stream_hidden_size, dtype=torch.bfloat16)
    x[:, : hidden.shape[1]] = hidden
    out = torch.empty_like(x)
    with engine.on_stream(late, x, index, weights, out):
        pass
    late.finish()
    assert not waited
    del engine
    gc.collect()
    assert waited == [late.device]
