"""A kernel object's memory is given back when the object goes, and no other memory is."""

from __future__ import annotations

import ctypes
import gc
from dataclasses import replace

import psutil
import pytest
import torch
from helpers.experts import batch, layer, lora_for, make_engine, reference
from helpers.marks import needs_kernel
from helpers.references import rel

from llamafactory_kt.adapters import ExpertsShape
from llamafactory_kt.checkpoint.expert_weights import LayerWeights
from llamafactory_kt.engines.ktkernel import free_0_7_2
from llamafactory_kt.engines.ktkernel.free_0_7_2 import UnknownLayoutError, packed_buffers
from llamafactory_kt.engines.ktkernel.kernel import KernelKind
from llamafactory_kt.engines.ktkernel.methods import PackedShape
from llamafactory_kt.engines.ktkernel.pack import write_packed
from llamafactory_kt.engines.ktkernel.sft_kernel import SftKernel
from llamafactory_kt.engines.registry import get_engine

pytestmark = [needs_kernel, pytest.mark.usefixtures("worker_threads")]
MB = 2**20
KEPT = 64  # glibc keeps this much at the end of a thread's arena (M_TRIM_THRESHOLD grows to it), once for each sub-pool
LARGE = ExpertsShape(32, 1024, 1024)  # 192 MB in bf16, 6 MB a block: the allocator maps them
SMALL = ExpertsShape(40, 128, 256)  # 64 KB a block: they are in the allocator's heap
BOUND = {"AMXBF16": 0.01, "AMXINT4": 0.3}


def resident() -> float:
    gc.collect()
    return psutil.Process().memory_info().rss / MB


def check(engine, shape: ExpertsShape, weights: LayerWeights) -> None:
    """The first experts' results are right, so the weights are all there."""
    x, _, scores = batch(shape, 4)
    index = torch.arange(12).reshape(4, 3) % shape.num_experts
    few = LayerWeights(weights.gate[:12], weights.up[:12], weights.down[:12])
    assert rel(engine.forward(x, index, scores), reference(few, None, x, index, scores)) < BOUND[engine.name]


def test_memory_is_given_back_and_taken_again():
    weights, least = layer(LARGE), {"AMXBF16": 190, "AMXINT4": 45}

    def load_and_drop(kind: str) -> float:
        engine = make_engine(kind, LARGE, weights, chunk=4)
        engine.set_lora(lora_for(LARGE, 8, 2.0))
        engine.set_lora(None)
        check(engine, LARGE, weights)
        return resident()

    for kind in least:
        load_and_drop(kind)  # threads and work buffers of kt-kernel and torch, which stay
    before = resident()
    for kind in ("AMXBF16", "AMXINT4", "AMXBF16"):
        assert load_and_drop(kind) - before > least[kind]
        assert resident() - before < KEPT


def test_cycles_of_different_kinds_stay_flat():
    weights = {shape: layer(shape) for shape in (SMALL, ExpertsShape(16, 1024, 512))}
    sizes = []
    for _ in range(6):
        for shape, value in weights.items():
            for kind, rank in (("AMXBF16", 4), ("AMXINT4", 16)):
                engine = make_engine(kind, shape, value, rank=rank, chunk=4)
                check(engine, shape, value)
        del engine
        sizes.append(resident())
    assert max(sizes[2:]) - sizes[1] < KEPT, sizes  # 70 MB a cycle otherwise


def small_kernel(kind="AMXBF16", directory=None):
    packed = PackedShape.of(get_engine(kind).method, SMALL, 1)
    if directory is not None:
        write_packed(packed.method, 0, 3, layer(SMALL), directory, 1, 1)
    return SftKernel(KernelKind(packed, 3, 8, 1.0, 16), 0, directory or layer(SMALL), verbose=False)


@pytest.mark.parametrize("kind", ["AMXBF16", "AMXINT8", "AMXINT4"])
def test_addresses_are_believed_together_or_not_at_all(kind, monkeypatch, tmp_path):
    kernel = small_kernel(kind, tmp_path if kind == "AMXINT8" else None)
    wrapper, shape = kernel.wrapper, kernel.kind.packed
    buffers = packed_buffers(wrapper.moe, shape)
    assert len(set(buffers)) == 3 * 40
    other = get_engine("AMXINT4" if kind == "AMXINT8" else "AMXINT8").method
    for changed in (
        replace(shape, num_experts=39), replace(shape, num_experts=41), replace(shape, hidden=256),
        replace(shape, intermediate=128), replace(shape, pools=2), replace(shape, method=other),
    ):  # fmt: skip
        with pytest.raises(UnknownLayoutError):
            packed_buffers(wrapper.moe, changed)
    with pytest.raises((UnknownLayoutError, OSError)):
        packed_buffers(object(), shape)

    # To spoil a pointer, the test has to find it as the module does, by what it alone knows of kt-kernel's objects.
    with open("/proc/self/mem", "rb", buffering=0) as memory:
        (value,) = free_0_7_2._words(memory, id(wrapper.moe) + free_0_7_2._VALUE, 1)
        (part,) = free_0_7_2._vector(memory, value + free_0_7_2._TPS, 1)
        pointers = free_0_7_2._vector(memory, part + free_0_7_2._PROJECTIONS[2], 2 * 40)
        first, last = (ctypes.c_uint64.from_address(pointers[n]) for n in (0, -2))
    right = last.value
    for wrong in (first.value, right + 64, right + 8, 0, 64):  # another's, inside of the block, not aligned, nowhere
        last.value = wrong
        try:
            with pytest.raises((UnknownLayoutError, OSError)):
                packed_buffers(wrapper.moe, shape)
        finally:
            last.value = right
    assert packed_buffers(wrapper.moe, shape) == buffers
    with monkeypatch.context() as another:
        another.setattr(free_0_7_2, "INTERNAL", replace(free_0_7_2.INTERNAL, versions="==0.7.3"))
        with pytest.raises(UnknownLayoutError, match=r"kt-kernel is not ==0\.7\.3"):
            packed_buffers(wrapper.moe, shape)
    monkeypatch.setattr(free_0_7_2, "BUILDS", frozenset())
    with pytest.raises(UnknownLayoutError, match="another build"):
        packed_buffers(wrapper.moe, shape)


def test_nothing_is_freed_that_somebody_may_still_use(caplog):
    """A kernel object that something else refers to keeps its weights, and the log says so."""
    kernel = small_kernel()
    wrapper, shape = kernel.wrapper, kernel.kind.packed
    moe, buffers = wrapper.moe, packed_buffers(wrapper.moe, shape)
    bytes_before = [ctypes.string_at(address, shape.method.nbytes(128, 256)) for address in buffers]
    with caplog.at_level("DEBUG", "llamafactory_kt"):
        del kernel, wrapper
        gc.collect()
    assert "somebody else refers" in caplog.text
    again = small_kernel()  # would take the blocks that were freed
    assert not set(buffers) & set(packed_buffers(again.wrapper.moe, shape))
    assert [ctypes.string_at(address, shape.method.nbytes(128, 256)) for address in buffers] == bytes_before
    assert packed_buffers(moe, shape) == buffers


def test_what_goes_while_another_is_built_is_freed_afterwards():
    kernel = small_kernel()
    wrapper = kernel.wrapper
    with free_0_7_2.building:
        del kernel
        gc.collect()
        assert wrapper.moe is not None
    free_0_7_2.free_dropped()
    assert wrapper.moe is None
