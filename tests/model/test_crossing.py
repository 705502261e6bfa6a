"""The way to the CPU and back: buffers, the order of waits, and shared experts that are queued early.

Without a GPU the same code runs with events that only note their calls.
"""

from __future__ import annotations

import ctypes
import gc
import threading
from functools import partial
from typing import ClassVar

import pytest
import torch
from conftest import needs_base_kernel, needs_kernel
from test_experts import batch, lora_for, make_engine, reference
from test_experts import layer as expert_weights
from tiny import make_model, rel
from transformers import AutoModelForCausalLM

from llamafactory_kt import KTExpertsConfig, get_router_stats
from llamafactory_kt.adapters import ExpertsShape
from llamafactory_kt.model import queueing
from llamafactory_kt.model.experts_module import KTExperts
from llamafactory_kt.model.gpu_transfer import SHARED_EXPERTS, Crossing, EarlyShared

IDS = torch.arange(2, 40)[None]
KERNELS = [pytest.param("AVX2BF16", marks=needs_base_kernel), pytest.param("AMXBF16", marks=needs_kernel)]


class Noted:
    """An event of a GPU that is never behind."""

    log: ClassVar[list[str]] = []

    def record(self):
        self.log.append("record")

    def synchronize(self):
        self.log.append("wait")


class Stream:
    """One of a GPU that is never behind: a task that is submitted is run at once."""

    cuda_stream, device = 7, torch.device("cpu")


def crossing():
    Noted.log.clear()
    return Crossing(Stream(), Noted, pinned=False)


def tokens(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    index = torch.randint(0, 9, (count, 2), generator=generator)
    return torch.randn(count, 8, generator=generator), index, torch.rand(count, 2, generator=generator)


def compute(hidden, index, weights):
    return hidden * weights.sum(1, keepdim=True) + index.sum(1, keepdim=True)


def test_one_wait_and_work_meanwhile():
    layer, log = crossing(), Noted.log
    given = tokens(5)
    layer.wait(compute, given)  # makes the buffers
    log.clear()
    out = layer.wait(lambda *all: (log.append("experts"), compute(*all))[1], given, lambda: log.append("meanwhile"))
    assert torch.equal(out, compute(*given))
    assert log == ["record", "meanwhile", "wait", "experts"]


def test_buffers_are_used_again_and_results_are_not():
    layer = crossing()
    given = [tokens(count, seed) for seed, count in enumerate([3, 40, 1, 40, 7])]
    found = [layer.wait(compute, each) for each in given]
    assert all(torch.equal(out, compute(*each)) for out, each in zip(found, given, strict=True))
    assert {name: len(buffer) for name, buffer in layer._buffers.items()} == {
        "hidden": 320, "index": 80, "weights": 80, "result": 320,
    }  # fmt: skip
    half = tuple(tensor.bfloat16() if tensor.is_floating_point() else tensor for tensor in tokens(3))
    assert layer.wait(compute, half).dtype == torch.bfloat16


class Infer:
    """kt-kernel's queue of tasks with its two calls for streams, without a GPU."""

    def __init__(self, stock, log):
        self._stock, self._log = stock, log

    def submit_with_cuda_stream(self, stream, task):
        assert stream == Stream.cuda_stream
        self._log.append("submit")
        self._stock.submit(task)

    def sync_with_cuda_stream(self, stream):
        assert stream == Stream.cuda_stream
        self._log.append("join")
        self._stock.sync()


@pytest.mark.parametrize("kind", KERNELS)
def test_a_stream_waits_instead_of_a_thread(monkeypatch, kind):
    """Layers in turn, with sizes that are padded and more tokens than a task takes, of float32 and of bfloat16."""
    shape, layer, log = ExpertsShape(5, 40, 24), crossing(), []
    weights_of = {
        make_engine(kind, shape, weights := expert_weights(shape, seed), chunk=16): weights for seed in (0, 1)
    }
    stock = next(iter(weights_of))._kernel.infer
    monkeypatch.setattr(type(next(iter(weights_of))._kernel), "infer", Infer(stock, log))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(queueing, "_devices", set())
    for number, count in enumerate([3, 40, 1, 16]):
        hidden, index, weights = batch(shape, count, seed=number)
        for given in ((hidden, index, weights), (hidden.float(), index.int(), weights.double())):
            for engine, kept in weights_of.items():
                log.clear()
                found = layer.queue(engine, given, lambda: log.append("meanwhile"))
                assert log == ["submit"] * -(-count // 16) + ["meanwhile", "join"]
                assert found.dtype == given[0].dtype
                assert rel(found, reference(kept, None, *given)) < 0.01
    log.clear()
    with pytest.raises(MemoryError):
        layer.queue(engine, given, raise_memory_error)
    assert log == ["submit", "join"], "or the next layer would write what this one reads"
    with pytest.raises(ValueError, match="expected 3 experts per token, got 2"):
        layer.queue(engine, (hidden, index[:, :2], weights[:, :2]))
    assert log == ["submit", "join"]


def raise_memory_error():
    raise MemoryError


class Mallinfo(ctypes.Structure):
    """mallinfo(3)"""

    _fields_ = [(name, ctypes.c_size_t) for name in (
        "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"
    )]  # fmt: skip


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="this C library does not say what is allocated")
@pytest.mark.parametrize("kind", KERNELS)
def test_calls_leave_nothing_behind(kind):
    """kt-kernel frees no task's arguments, 80 bytes of each layer for every token. Also under another default device."""
    mallinfo = ctypes.CDLL(None).mallinfo2
    mallinfo.restype = Mallinfo
    shape, layer = ExpertsShape(5, 40, 24), crossing()
    engine = make_engine(kind, shape, expert_weights(shape), chunk=16)
    prompts = [batch(shape, count) for count in (1, 40, 7)]

    def call_all(times):
        for _ in range(times):
            for given in prompts:
                with torch.device("meta"):
                    assert engine.forward(*given).device.type == "cpu"
                for start in range(0, len(given[0]), 16):
                    read = engine.as_read(*(tensor[start : start + 16] for tensor in given))
                    x, chosen, scores = layer._cross(read)
                    engine._kernel.task(x, chosen, scores, layer._buffer("result", x))
        gc.collect()
        return mallinfo().uordblks

    before = call_all(20)
    assert call_all(200) - before < 200 * 80


@needs_kernel
def test_lora_is_exchanged_when_nothing_computes_with_it(monkeypatch):
    shape, log = ExpertsShape(5, 40, 24), []
    engine = make_engine("AMXBF16", shape, expert_weights(shape))
    monkeypatch.setattr(queueing, "settle", lambda: log.append("settle"))
    set_lora = type(engine._kernel).set_lora
    monkeypatch.setattr(type(engine._kernel), "set_lora", lambda *given: (log.append("set"), set_lora(*given)))
    undo = engine.set_lora(lora_for(shape, 4, 1.0))
    assert log == ["settle", "set"]
    undo()
    assert log == ["settle", "set"] * 2


@pytest.mark.parametrize("kind", KERNELS)
def test_a_kernel_is_freed_when_nothing_computes_with_it(monkeypatch, kind):
    shape, waited = ExpertsShape(5, 40, 24), []
    engine = make_engine(kind, shape, expert_weights(shape))
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
    monkeypatch.setattr(queueing, "_devices", set())
    infer, given = Infer(engine._kernel.infer, []), engine.as_read(*batch(shape, 3))
    out = torch.empty_like(given[0])
    queueing.submit(infer, Stream(), engine._kernel.task(*given, out))
    queueing.join(infer, Stream())
    assert not waited
    del engine
    gc.collect()
    assert waited == [Stream.device]


def test_buffers_of_inference_mode_are_used_outside_of_it():
    layer, given = crossing(), tokens(5)
    with torch.inference_mode():
        layer.wait(compute, given)
    with torch.no_grad():
        assert torch.equal(layer.wait(compute, given), compute(*given))


def test_threads_cross_one_after_another():
    layer, given = crossing(), [tokens(6, seed) for seed in range(8)]
    wrong = []

    def work(each):
        wrong.extend(1 for _ in range(200) if not torch.equal(layer.wait(compute, each), compute(*each)))

    threads = [threading.Thread(target=work, args=(each,)) for each in given]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert not wrong


@pytest.mark.parametrize("arch", ["deepseek_v2", "glm4_moe", "qwen2_moe"])
def test_shared_experts_are_computed_once_and_early(tmp_path, monkeypatch, arch):
    """Where the model calls them after the routed experts; where it calls them before, they stay where they are."""
    path = make_model(tmp_path / "model", arch)
    config = KTExpertsConfig(backend="torch", router_stats=True)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, quantization_config=config)
    with torch.inference_mode():
        wanted = [model(input_ids=ids).logits for ids in (IDS, IDS + 3, IDS[:, :5])]
    stats, log, layer = get_router_stats(model), [], crossing()
    for name, module in model.named_modules():
        shared = next((module._modules[part] for part in SHARED_EXPERTS if part in module._modules), None)
        if shared is not None and isinstance(module._modules.get("experts"), KTExperts):
            stock = shared.forward
            shared.forward = lambda x, stock=stock, name=name: (log.append(f"shared {name}"), stock(x))[1]
            module.experts.early = EarlyShared(shared)
            compute_stock = module.experts._compute
            module.experts._compute = lambda *all, stock=compute_stock, name=name: (log.append(f"routed {name}"), stock(*all))[1]  # fmt: skip

    def cross(self, *given):
        return layer.wait(self._compute, given, partial(self.early.queue, given[0]))

    monkeypatch.setattr(KTExperts, "forward", cross)
    with torch.inference_mode():
        found = [model(input_ids=ids).logits for ids in (IDS, IDS + 3, IDS[:, :5])]
    assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))
    layers = len(model._kt_wrappers)
    assert len(log) == len(set(log)) * 3 == layers * 2 * 3, "each once in each of three calls"
    assert all(line.startswith("shared") for line in log[::2]), "before the routed ones, early or by the model itself"
    twice = get_router_stats(model)
    assert all((2 * stats[n].counts == twice[n].counts).all() for n in stats), "what is counted is not overwritten"
