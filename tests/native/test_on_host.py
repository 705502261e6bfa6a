"""Experts that a stream computes without Python, against the engine's own ``forward``: bit for bit, with LoRA, again in a graph.

Instead of CUDA there is a stand-in that calls functions of the host in a thread of its own. Whoever waits for it here holds Python's global
lock, so a call that needed Python would never end.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import shutil
import time
import weakref
from pathlib import Path

import pytest
import torch
from helpers.experts import batch, layer, lora_for, make_engine
from helpers.loading import load
from helpers.models import make_model
from helpers.places import TESTS

from llamafactory_kt.adapters import ExpertsShape
from llamafactory_kt.engines import streams
from llamafactory_kt.engines.native import engine as engine_module
from llamafactory_kt.ground.internals import SWITCH
from llamafactory_kt.model.on_gpu.transfer import HostTransfer
from llamafactory_kt.native import on_host
from llamafactory_kt.native.library import library

pytestmark = [
    pytest.mark.skipif(isinstance(library(), str), reason=str(library())),
    pytest.mark.skipif(not shutil.which("c++"), reason="there is no C++ compiler for the stand-in"),
]
SHAPE = ExpertsShape(6, 40, 24)
ENGINES = ["native", "INT8"]


class HostStream:
    """A ``DeviceStream`` of the stand-in."""

    device = torch.device("cpu")

    def __init__(self, standin):
        self._standin, self.capturing = standin, False
        self._copied = []  # a GPU's memory is used again by its stream alone, when its turn comes
        self._pinned = []
        self.cuda_stream = standin.standin_stream()

    def current(self):
        return contextlib.nullcontext()

    def pinned(self, count, dtype):
        buffer = torch.empty(count, dtype=dtype)
        self._pinned.append((buffer.untyped_storage().data_ptr(), weakref.ref(buffer), self.capturing))
        return buffer

    def copy(self, target, source):
        assert target.is_contiguous() and source.is_contiguous() and target.dtype == source.dtype
        for tensor in (target, source):
            address = tensor.untyped_storage().data_ptr()
            owner = next((captured for place, _, captured in reversed(self._pinned) if place == address), None)
            if owner is None:
                self._copied.append(tensor)
            assert owner in (None, self.capturing), "a graph's buffer is nobody else's"
        self._standin.standin_copy(self.cuda_stream, target.data_ptr(), source.data_ptr(), source.nbytes)
        return target

    def record(self):
        pass

    def synchronize(self):
        self._standin.standin_synchronize(self.cuda_stream)

    @contextlib.contextmanager
    def graph(self):
        """What is queued in the block is not done, but captured."""
        self.capturing = True
        self._standin.standin_capture(self.cuda_stream, 1)
        yield
        self._standin.standin_capture(self.cuda_stream, 0)
        self.capturing = False

    def replay(self):
        assert all(buffer() is not None for _, buffer, captured in self._pinned if captured)
        self._standin.standin_replay(self.cuda_stream)


@pytest.fixture(scope="module")
def standin(tmp_path_factory):
    from llamafactory_kt.native import build

    target = tmp_path_factory.mktemp("cudart") / "libstandin.so"
    source = TESTS / "native" / "standin_cudart.cpp"
    problem = build.compile_files(["c++"], [source], target, ["-O1", "-fvisibility=default"], ["-shared", "-lpthread"])
    assert not problem, problem
    found = ctypes.PyDLL(str(target))  # which keeps the global lock during a call
    found.standin_stream.restype = ctypes.c_void_p
    found.cudaLaunchHostFunc.argtypes = [ctypes.c_void_p] * 3
    found.standin_copy.argtypes = [ctypes.c_void_p] * 3 + [ctypes.c_ulong]
    for name in ("standin_replay", "standin_synchronize"):
        getattr(found, name).argtypes = [ctypes.c_void_p]
    found.standin_capture.argtypes = [ctypes.c_void_p, ctypes.c_int]
    return found


@pytest.fixture
def stream(standin, monkeypatch):
    monkeypatch.setattr(on_host, "cuda_runtime", lambda: standin)
    monkeypatch.setattr(engine_module, "cuda_runtime", lambda: standin)
    monkeypatch.setattr(streams, "_devices", set())
    made = HostStream(standin)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: made.synchronize())
    return made


def engines(kind, rank):
    """Two layers, the second with LoRA."""
    made = [make_engine(kind, SHAPE, layer(SHAPE, seed)) for seed in (0, 1)]
    if rank:
        made[1].set_lora(lora_for(SHAPE, rank, 1.5))
    return made


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("rank", [0, 5])
@pytest.mark.parametrize("kind", ENGINES)
def test_as_the_engine_computes(stream, monkeypatch, kind, rank, dtype):
    """Layers in turn, all queued before anything is waited for, in pieces of at most 64 tokens."""
    monkeypatch.setattr(engine_module, "CHUNK", 64)
    transfer, checks = HostTransfer(stream), []
    layers = engines(kind, rank)
    for number, tokens in enumerate([300, 1, 3, 65, 17]):
        for engine in layers:
            hidden, index, weights = batch(SHAPE, tokens, seed=number)
            given = hidden.to(dtype), index, weights
            assert engine.streams
            checks.append((transfer.forward(engine, given), engine, given))
    stream.synchronize()
    for found, engine, given in checks:
        assert found.dtype == dtype and torch.equal(found, engine.forward(*given))
    assert not torch.equal(checks[0][0], checks[1][0])


@pytest.mark.parametrize("kind", ENGINES)
def test_a_graph_computes_with_what_is_in_place(stream, kind):
    """New tokens, another LoRA of another rank and none, other calls between replays; and a second graph, of more tokens."""
    transfer, layers = HostTransfer(stream), engines(kind, 3)
    given, more = batch(SHAPE, 2), batch(SHAPE, 9, seed=4)

    def capture(given):
        with stream.graph():
            return [transfer.forward(engine, given) for engine in layers]

    found = capture(given)
    for seed, rank in enumerate((3, 8, 0, 2)):
        layers[0].set_lora(lora_for(SHAPE, rank, 0.5, seed) if rank else None)
        for kept, new in zip(given, batch(SHAPE, 2, seed=10 + seed), strict=True):
            kept.copy_(new)
        stream.replay()
        between = transfer.forward(layers[0], more)
        stream.synchronize()
        assert torch.equal(between, layers[0].forward(*more))
        for out, engine in zip(found, layers, strict=True):
            assert torch.equal(out, engine.forward(*given))
    larger = capture(more)
    stream.replay()  # and the first graph could be
    stream.synchronize()
    assert all(torch.equal(out, engine.forward(*more)) for out, engine in zip(larger, layers, strict=True))


def test_what_runs_meanwhile_does_not_wait_for_the_experts(stream, standin):
    """In a graph: start, the shared experts' work, finish."""
    engine, transfer, order = engines("native", 0)[0], HostTransfer(stream), []
    functions = "kt_start_on_host", "kt_finish_on_host"
    names = {ctypes.cast(getattr(on_host.kernels(), name), ctypes.c_void_p).value: name for name in functions}

    class Log:
        def cudaLaunchHostFunc(self, stream, function, data):
            order.append(names[function.value])
            return standin.cudaLaunchHostFunc(stream, function, data)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(on_host, "cuda_runtime", Log)
        transfer.forward(engine, batch(SHAPE, 2), lambda: order.append("meanwhile"))
    stream.synchronize()
    assert order == ["kt_start_on_host", "meanwhile", "kt_finish_on_host"]


def test_a_wrong_index_is_raised_later_and_is_no_result(stream):
    engine, transfer = engines("native", 0)[0], HostTransfer(stream)
    hidden, index, weights = batch(SHAPE, 2)
    wrong = index.clone()
    wrong[1, 2] = SHAPE.num_experts
    out = transfer.forward(engine, (hidden, wrong, weights))
    stream.synchronize()
    assert out.isnan().all()
    with pytest.raises(IndexError, match="none of the 6"):
        transfer.forward(engine, (hidden, index, weights))
    out = transfer.forward(engine, (hidden, index, weights))
    stream.synchronize()
    assert torch.equal(out, engine.forward(hidden, index, weights))


def test_a_generation_ends_with_what_its_stream_has_failed_with(stream, tmp_path):
    """A graph is replayed without Python: nobody else would hear of it."""
    model = load(make_model(tmp_path / "model", "qwen3_moe"), "native")
    engine, transfer = engines("native", 0)[0], HostTransfer(stream)
    hidden, index, weights = batch(SHAPE, 1)
    transfer.forward(engine, (hidden, index - 10, weights))
    stream.synchronize()
    given = {"input_ids": torch.arange(2, 9)[None], "max_new_tokens": 2, "do_sample": False}
    with pytest.raises(IndexError, match="none of the 6"):
        model.generate(**given)
    model.generate(**given)


def test_calls_are_kept_only_as_long_as_they_are_needed(stream):
    engine, transfer = engines("native", 0)[0], HostTransfer(stream)
    given = batch(SHAPE, 2)
    for _ in range(50):
        transfer.forward(engine, given)
    stream.synchronize()
    transfer.forward(engine, given)
    assert len(engine._calls) == 1
    with stream.graph():
        transfer.forward(engine, given)
    for _ in range(3):
        stream.synchronize()
        transfer.forward(engine, given)
    assert len(engine._calls) == 2, "the graph's, and the last"


def test_an_engine_is_freed_when_no_stream_computes_with_it(stream, monkeypatch):
    waited, transfer = [], HostTransfer(stream)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: (waited.append(device), stream.synchronize()))
    engine = make_engine("native", SHAPE, layer(SHAPE))
    engine.set_lora(None)
    del engine
    gc.collect()
    assert not waited, "no stream has called it"
    engine, given = make_engine("native", SHAPE, layer(SHAPE)), batch(SHAPE, 200)
    transfer.forward(engine, given)
    engine.set_lora(lora_for(SHAPE, 2, 1.0))
    assert waited == [stream.device]
    del engine
    gc.collect()
    assert waited == [stream.device] * 2


def test_one_team_computes_for_all_streams_and_ends_when_idle(stream, standin, monkeypatch):
    """A thread for each stream is the stand-in's; the library adds one team, whichever stream calls."""
    monkeypatch.setattr(engine_module, "_most_threads", lambda: 9)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    engine, given, several = (
        engines("native", 0)[0],
        batch(SHAPE, 40),
        [stream, HostStream(standin), HostStream(standin)],
    )
    time.sleep(1.5)  # threads of other tests are gone
    before = len(os.listdir("/proc/self/task"))
    transfers = [HostTransfer(each) for each in several]
    found = [transfer.forward(engine, given) for transfer in transfers for _ in range(5)]
    for each in several:
        each.synchronize()
    assert len(os.listdir("/proc/self/task")) - before <= 3
    wanted = engine.forward(*given)  # and this thread's own team of 3
    assert all(torch.equal(out, wanted) for out in found)
    for _ in range(600):
        if len(os.listdir("/proc/self/task")) - before <= 2:  # this thread's
            break
        time.sleep(0.1)
    else:
        pytest.fail("the team waits for another call after a minute")


def test_cuda_says_no(stream, monkeypatch):
    hidden, index, weights = batch(SHAPE, 1)
    monkeypatch.setattr(stream, "cuda_stream", None)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    refused = engines("native", 0)[0].on_stream(stream, hidden, index, weights, torch.empty_like(hidden))
    with pytest.raises(RuntimeError, match="cudaLaunchHostFunc failed with CUDA's error 400"), refused:
        pass


def test_where_the_runtime_is_found(monkeypatch):
    """Where torch has loaded one, a GPU or none; and not where it is switched off."""
    found = on_host.cuda_runtime.__wrapped__()
    assert (found is not None) == ("/libcudart" in Path("/proc/self/maps").read_text())
    monkeypatch.setenv(SWITCH, "cuda-runtime")
    assert on_host.cuda_runtime.__wrapped__() is None
