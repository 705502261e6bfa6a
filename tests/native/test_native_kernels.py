"""The native kernels from Python against float64 sums: each instruction set that this CPU has, and AMX emulated; all dtypes, odd sizes, few tokens and many; and
as a process that forks or ends meets them. ``test_binary.py`` checks the kernels alone, at more sizes."""

from __future__ import annotations

import itertools
import os

import pytest
import torch
from helpers.children import child
from helpers.experts import batch, layer, lora_for, make_engine, reference
from helpers.references import rel

from llamafactory_kt.adapters import ExpertsShape
from llamafactory_kt.checkpoint.expert_weights import LayerWeights
from llamafactory_kt.native import calls
from llamafactory_kt.native import library as library_module
from llamafactory_kt.native.head_products import HeadProducts
from llamafactory_kt.native.library import VARIABLE, library
from llamafactory_kt.native.openmp import release_team

LIBRARY = library()
SETS = [] if isinstance(LIBRARY, str) else LIBRARY.kt_instruction_sets().decode().split(",")
pytestmark = pytest.mark.skipif(not SETS, reason=str(LIBRARY))
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BOUND = {torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 1e-3}
"""float32 sums, rounded once"""


PAIRS = ("avx512bf16", "amx")
"""these multiply bf16 weights by activations rounded to bf16"""
THREADS = (1, 3, 5, 16)


@pytest.fixture(params=dict.fromkeys([*SETS, "amx"]))
def instructions(request, monkeypatch):
    if request.param not in SETS:
        found = loaded(request.getfixturevalue("emulated"))
        monkeypatch.setattr(library_module, "library", lambda: found)
    before = library_module.kernels().kt_in_use()
    assert library_module.kernels().kt_use(request.param.encode()) == 0
    yield request.param
    library_module.kernels().kt_use(before)


def loaded(path):
    """The library that lies there, ready to be called."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(library_module, "LIBRARY", path)
        found = library.__wrapped__()
    assert not isinstance(found, str), found
    return found


# tokens, out, in, rank
SIZES = [
    (1, 7, 5, 0), (1, 64, 128, 8), (3, 33, 100, 3), (5, 50, 65, 16), (9, 40, 64, 4), (17, 25, 31, 1), (65, 96, 129, 256), (300, 61, 70, 5),
    (1000, 13, 33, 0), (0, 4, 4, 2),
]  # fmt: skip


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_linear(instructions, sizes):
    tokens, out, width, rank = sizes
    generator = torch.Generator().manual_seed(tokens)

    def random(*shape):
        return torch.randn(*shape, generator=generator)

    for weight_dtype, dtype in itertools.product(DTYPES, (torch.float32, torch.bfloat16)):
        weight = random(out, width + 3).to(weight_dtype)[:, :width]  # rows apart
        x, bias = random(tokens, width).to(dtype), random(out)
        a, b = (random(rank, width), random(out, rank)) if rank else (None, None)
        found = calls.linear(x, weight, a, b, bias, 2)
        rounded = x.bfloat16() if instructions in PAIRS and weight_dtype == torch.bfloat16 else x
        wanted = rounded.double() @ weight.double().T + bias.double()
        if rank:
            wanted += (x.double() @ a.double().T) @ b.double().T
        assert not tokens or rel(found, wanted) < BOUND[dtype], (weight_dtype, dtype)
        for threads in THREADS:
            assert torch.equal(found, calls.linear(x, weight, a, b, bias, threads)), (
                "the number of threads must not matter"
            )


@pytest.fixture
def threads():
    """Sets PyTorch's number."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("tokens, rank", [(1, 1), (1, 8), (2, 3), (9, 16), (70, 256), (300, 5)], ids=str)
def test_experts(instructions, threads, tokens, rank):
    shape = ExpertsShape(13, 72, 40)
    _, index, scores = batch(shape, tokens)
    for weight_dtype, dtype in itertools.product(DTYPES, (torch.float32, torch.bfloat16)):
        weights = LayerWeights(*(getattr(layer(shape), name).to(weight_dtype) for name in ("gate", "up", "down")))
        lora = lora_for(shape, rank, 0.7)
        engine = make_engine("native", shape, weights, rank=rank)
        pairs = instructions in PAIRS and weight_dtype == torch.bfloat16  # rounds between the products, too
        x = batch(shape, tokens)[0].to(dtype)
        found, wanted = [], []
        for given in (None, lora):
            engine.set_lora(given)
            threads(2)
            found.append(engine.forward(x, index, scores))
            wanted.append(reference(weights, given, x, index, scores))
            assert rel(found[-1], wanted[-1]) < (4e-3 if pairs else BOUND[dtype]), (weight_dtype, dtype)
            for number in THREADS:
                threads(number)
                assert torch.equal(found[-1], engine.forward(x, index, scores)), "the number of threads must not matter"
        effect = rel(found[1].double() - found[0].double(), wanted[1] - wanted[0])
        assert effect < (2e-2 if pairs or dtype == torch.bfloat16 else 1e-5), (weight_dtype, dtype)


def test_the_team_of_pytorch():
    """The kernels compute in the threads that PyTorch has already, whichever OpenMP those are of, and after a team has ended."""

    def threads() -> int:
        return len(os.listdir("/proc/self/task"))

    before, x, weight = torch.get_num_threads(), torch.randn(64, 512), torch.randn(512, 512)
    torch.set_num_threads(2)
    try:
        wanted = calls.linear(x, weight, None, None, None, 2)
        torch.randn(512, 512) @ weight
        running = threads()
        assert torch.equal(calls.linear(x, weight, None, None, None, 2), wanted) and threads() <= running
        release_team()
        assert torch.equal(calls.linear(x, weight, None, None, None, 2), wanted) and threads() <= running
    finally:
        torch.set_num_threads(before)
        release_team()


LINEAR = """
    import os, signal, sys, threading, time, torch
    from llamafactory_kt.native import calls
    from llamafactory_kt.native.library import library
    x, weight = torch.randn(40, 300), torch.randn(500, 300)
    def compute():
        return calls.linear(x, weight, None, None, None, 2)
"""


def test_the_variable_chooses_an_instruction_set_or_none():
    code = """
        from llamafactory_kt.native.library import library
        found = library()
        print(found if isinstance(found, str) else found.kt_in_use().decode())
    """
    said = {value: child(code, **{VARIABLE: value}).stdout.strip() for value in (SETS[-1], "none", "avx1024")}
    assert said[SETS[-1]] == SETS[-1]
    assert said["none"] == f"{VARIABLE} is none"
    assert said["avx1024"] == f"{VARIABLE} is 'avx1024'; unset it, or set one that this CPU has: {', '.join(SETS)}"


def test_a_forked_process_computes_too():
    """Alone: it has none of the team's threads, and waiting for them would hang."""
    code = """
    wanted = compute()
    if os.fork() == 0:
        signal.alarm(60)
        os._exit(0 if torch.equal(compute(), wanted) else 1)
    print(os.waitstatus_to_exitcode(os.wait()[1]), torch.equal(compute(), wanted))
    """
    done = child(LINEAR + code)
    assert done.stdout.split() == ["0", "True"], done.stdout + done.stderr


def test_a_process_ends_while_a_thread_computes():
    """In the kernels alone: before 3.14, Python ends a thread that comes back from PyTorch's C++ by an exception, which aborts the process."""
    code = """
    from ctypes import byref
    compute()
    kernels, out = calls.kernels(), torch.empty(40, 500)
    call = calls.LinearCall(500, 300, 0, calls.DTYPES[x.dtype], None, calls.Weight(weight.data_ptr(), 300, None, None, None))
    needed, given = kernels.kt_linear_scratch(byref(call), 40, 2), (x.data_ptr(), calls.DTYPES[x.dtype], 40, out.data_ptr())
    started = threading.Event()
    def work():
        memory = calls.scratch(needed)
        while True:
            kernels.kt_linear_forward(byref(call), *given, memory, 2), started.set()
    threading.Thread(target=work, daemon=True).start()
    started.wait(), time.sleep(0.2)
    print("ends")
    """
    done = child(LINEAR + code)
    assert (done.returncode, done.stdout.strip()) == (0, "ends"), done.stderr


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", [1, 3, 40])
def test_products_of_heads(instructions, dtype, tokens):
    """Each head's input with its part of a weight, straight and transposed, with LoRA of two adapters; weights lie inside of others."""
    torch.manual_seed(tokens)
    bound = {torch.float32: 1e-6, torch.bfloat16: 3e-3, torch.float16: 4e-4}[dtype]
    for heads, rows, others, cols in ((3, 17, 23, 61), (5, 64, 40, 96), (1, 128, 0, 256)):
        whole = torch.randn(heads, others + rows, cols).to(dtype)
        weight, wanted = whole[:, others:], whole[:, others:].double()
        factors = [(torch.randn(r, cols), torch.randn(heads, rows + 4, r)[:, 4:], 0.3) for r in (3, 5)]
        for own in ([], factors):
            wanted = wanted + sum((s * b.double() @ a.double() for a, b, s in own), torch.zeros(()))
            for transposed, name in ((False, "thc,hrc->thr"), (True, "thr,hrc->thc")):
                x = torch.randn(tokens, heads, rows if transposed else cols).to(dtype)
                found = HeadProducts(weight, own, transposed=transposed)(x)
                assert found.dtype == dtype and rel(found, torch.einsum(name, x.double(), wanted)) < bound
