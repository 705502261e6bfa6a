"""How a layer's tokens cross from a GPU to the CPU and back: buffers, the order of waits, and nothing read or written
too early.

Instead of a GPU there is a stream that does its work only when somebody waits for it.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import threading

import pytest
import torch
from helpers.experts import batch, make_engine, reference
from helpers.experts import layer as expert_weights
from helpers.marks import needs_base_kernel, needs_kernel
from helpers.references import rel
from helpers.streams import LateStream, LateWorkers

from llamafactory_kt.adapters import ExpertsShape
from llamafactory_kt.engines import streams
from llamafactory_kt.model.on_gpu.transfer import HostTransfer

KERNELS = [pytest.param("AVX2BF16", marks=needs_base_kernel), pytest.param("AMXBF16", marks=needs_kernel)]


def compute(hidden, index, weights):
    return hidden * weights.sum(1, keepdim=True).to(hidden.dtype) + index.sum(1, keepdim=True)


class Sum:
    """An engine that the stream can wait for, or one that only a thread can wait for."""

    name = "sum"
    captures = False
    stream_hidden_size = 8

    def __init__(self, streams):
        self.streams = streams

    def stream_dtype(self, dtype):
        return torch.bfloat16

    def forward(self, hidden, index, weights):
        return compute(hidden, index, weights)

    @contextlib.contextmanager
    def on_stream(self, stream, x, index, scores, out):
        hidden, chosen, weights, result = (memory(tensor) for tensor in (x, index, scores, out))
        stream.launch(lambda: result.copy_(compute(hidden, chosen, weights)))
        try:
            yield
        finally:
            stream.join()


BOTH = pytest.mark.parametrize("engine", [Sum(streams=True), Sum(streams=False)], ids=["stream waits", "thread waits"])


def memory(tensor):
    """The same memory, as the CPU's task knows it: by its address, which keeps no tensor alive."""
    return torch.empty(0, dtype=tensor.dtype).set_(
        tensor.untyped_storage(), tensor.storage_offset(), tensor.shape, tensor.stride()
    )


def tokens(count, seed=0, dtype=torch.bfloat16):
    generator = torch.Generator().manual_seed(seed)
    index = torch.randint(0, 9, (count, 2), generator=generator)
    return torch.randn(count, 8, generator=generator).to(dtype), index, torch.rand(count, 2, generator=generator)


@BOTH
@pytest.mark.parametrize("counts", [[5, 5, 5], [3, 40, 1, 41, 7]], ids=str)
def test_layers_queued_one_after_another(engine, counts):
    """All of them are queued before the stream has done more than it was waited for; buffers grow on the way."""
    stream = LateStream()
    transfer = HostTransfer(stream)
    given = [tokens(count, seed) for seed, count in enumerate(counts)]
    found = [transfer.forward(engine, each) for each in given]
    stream.finish()
    assert all(torch.equal(out, compute(*each)) for out, each in zip(found, given, strict=True))


def test_one_wait_and_work_meanwhile():
    stream, given = LateStream(), tokens(5)
    transfer, engine = HostTransfer(stream), Sum(streams=False)
    transfer.forward(engine, given)  # makes the buffers
    stream.log.clear()
    out = transfer.forward(engine, given, lambda: stream.log.append("meanwhile"))
    assert stream.log == ["record", "meanwhile", "wait"]
    stream.finish()
    assert torch.equal(out, compute(*given))


def test_no_wait_where_the_stream_waits():
    stream, given = LateStream(), tokens(5)
    transfer, engine = HostTransfer(stream), Sum(streams=True)
    transfer.forward(engine, given)
    stream.log.clear()
    out = transfer.forward(engine, given, lambda: stream.log.append("meanwhile"))
    assert stream.log == ["launch", "meanwhile", "join"]
    stream.finish()
    assert torch.equal(out, compute(*given))


@BOTH
def test_values_that_somebody_keeps_stay_as_they_are(engine):
    """Router statistics keep them while the next layer uses the buffers again."""
    transfer, kept = HostTransfer(LateStream()), []
    given = [tokens(5, seed) for seed in range(3)]
    for each in given:
        transfer.forward(engine, each, seen=lambda *of: kept.append(of))
    for (index, weights), (_, wanted, scores) in zip(kept, given, strict=True):
        assert torch.equal(index, wanted) and torch.equal(weights, scores)


@BOTH
def test_buffers_are_used_again_and_results_are_not(engine):
    stream = LateStream()
    transfer = HostTransfer(stream)
    given = [tokens(count, seed) for seed, count in enumerate([3, 40, 1, 40, 7])]
    found = [transfer.forward(engine, each) for each in given]
    stream.finish()
    assert all(torch.equal(out, compute(*each)) for out, each in zip(found, given, strict=True))
    assert len({out.data_ptr() for out in found}) == len(found)
    assert stream.allocated == [3 * 8, 3 * 2, 3 * 2, 3 * 8, 40 * 8, 40 * 2, 40 * 2, 40 * 8]
    half = transfer.forward(Sum(streams=False), tokens(3, dtype=torch.float16))
    stream.finish()
    assert half.dtype == torch.float16 and torch.equal(half, compute(*tokens(3, dtype=torch.float16)))


@BOTH
def test_buffers_of_inference_mode_are_used_outside_of_it(engine):
    stream, given = LateStream(), tokens(5)
    transfer = HostTransfer(stream)
    with torch.inference_mode():
        transfer.forward(engine, given)
    with torch.no_grad():
        out = transfer.forward(engine, given)
    stream.finish()
    assert torch.equal(out, compute(*given))


@BOTH
def test_threads_cross_one_after_another(engine):
    stream = LateStream()
    transfer, wrong = HostTransfer(stream), []

    def work(seed):
        for number in range(100):
            given = tokens(6, 100 * seed + number)
            out = transfer.forward(engine, given)
            stream.finish()
            wrong.extend([1] if not torch.equal(out, compute(*given)) else [])

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert not wrong


def test_an_error_meanwhile_does_not_keep_the_stream_from_waiting():
    """Otherwise the next layer would overwrite what this one still reads."""
    stream = LateStream()
    transfer, engine = HostTransfer(stream), Sum(streams=True)

    def raise_memory_error():
        raise MemoryError

    with pytest.raises(MemoryError):
        transfer.forward(engine, tokens(5), raise_memory_error)
    assert stream.log[-2:] == ["launch", "join"]
    out = transfer.forward(engine, tokens(5, seed=1))
    stream.finish()
    assert torch.equal(out, compute(*tokens(5, seed=1)))


def test_a_cuda_graph_that_needs_a_thread_is_declined():
    stream, engine = LateStream(), Sum(streams=True)
    stream.capturing = True
    with pytest.raises(RuntimeError, match="cannot be captured in a CUDA graph with kt_backend: sum"):
        HostTransfer(stream).forward(engine, tokens(5))
    engine.captures = True
    with pytest.raises(RuntimeError, match="cannot be captured in a CUDA graph with kt_router_stats"):
        HostTransfer(stream).forward(engine, tokens(5), seen=print)
    assert not stream.log and not stream.allocated


@pytest.fixture
def no_gpu_is_waited_for(monkeypatch):
    """kt-kernel's engines wait for every device that a task was submitted for; here there is none."""
    waited = []
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
    monkeypatch.setattr(streams, "_devices", set())  # what other tests have submitted for is no affair of this one's
    return waited


@pytest.mark.parametrize("behind", [True, False], ids=["behind", "not behind"])
@pytest.mark.parametrize("kind", KERNELS)
def test_a_stream_waits_instead_of_a_thread(monkeypatch, no_gpu_is_waited_for, kind, behind):
    """Layers in turn, with sizes that need padding and more tokens than a task takes, in float32 and in bfloat16."""
    shape, stream = ExpertsShape(5, 40, 24), LateStream(behind)
    transfer = HostTransfer(stream)
    weights_of = {
        make_engine(kind, shape, weights := expert_weights(shape, seed), chunk=16): weights for seed in (0, 1)
    }
    kernel = next(iter(weights_of)).kernel
    monkeypatch.setattr(type(kernel), "infer", LateWorkers(kernel.infer, stream))
    checks = []
    for number, count in enumerate([3, 40, 1, 16]):
        hidden, index, weights = batch(shape, count, seed=number)
        every = [(hidden, index, weights)]
        if not behind:  # else what changes the result's type would come before the result
            every.append((hidden.float(), index.int(), weights.double()))
        for given in every:
            for engine, kept in weights_of.items():
                stream.log.clear()
                found = transfer.forward(engine, given, lambda: stream.log.append("meanwhile"))
                assert [entry for entry in stream.log if entry not in ("record", "wait")] == (
                    ["launch"] * -(-count // 16) + ["meanwhile", "join"]
                )
                checks.append((found, given, kept))
    stream.finish()
    for found, given, kept in checks:
        assert found.dtype == given[0].dtype and rel(found, reference(kept, None, *given)) < 0.01
    stream.log.clear()
    with pytest.raises(ValueError, match="expected 3 experts per token, got 2"):
        transfer.forward(engine, (hidden, index[:, :2], weights[:, :2]))
    assert not stream.log


class Mallinfo(ctypes.Structure):
    """mallinfo(3)"""

    _fields_ = [(name, ctypes.c_size_t) for name in (
        "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"
    )]  # fmt: skip


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="this C library does not say what is allocated")
@pytest.mark.parametrize("kind", KERNELS)
def test_calls_leave_nothing_behind(monkeypatch, no_gpu_is_waited_for, kind):
    """kt-kernel never frees a task's arguments: 80 bytes for each layer and token. Also with another default device."""
    mallinfo = ctypes.CDLL(None).mallinfo2
    mallinfo.restype = Mallinfo
    shape, stream = ExpertsShape(5, 40, 24), LateStream(behind=False)
    transfer = HostTransfer(stream)
    engine = make_engine(kind, shape, expert_weights(shape), chunk=16)
    monkeypatch.setattr(type(engine.kernel), "infer", LateWorkers(engine.kernel.infer, stream))
    prompts = [batch(shape, count) for count in (1, 40, 7)]

    def call_all(times):
        for _ in range(times):
            for given in prompts:
                with torch.device("meta"):
                    assert engine.forward(*given).device.type == "cpu"
                transfer.forward(engine, given)
        stream.log.clear()
        gc.collect()
        return mallinfo().uordblks

    before = call_all(20)
    assert call_all(200) - before < 200 * 80
