"""Which engine and threads are chosen: by the machine's limits, by what was measured, and how they then run."""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from helpers.marks import needs_kernel, needs_onednn
from helpers.models import make_model
from transformers import AutoModelForCausalLM

from llamafactory_kt import KTConfigError, KTExpertsConfig
from llamafactory_kt.adapters import ExpertsShape
from llamafactory_kt.autotune import choose as choosing
from llamafactory_kt.autotune import plan, worker
from llamafactory_kt.autotune.choose import Measured, choose
from llamafactory_kt.autotune.plan import Plan, candidates, choose_threads
from llamafactory_kt.autotune.worker import in_turn
from llamafactory_kt.checkpoint.discovery import find_experts
from llamafactory_kt.engines.ktkernel import sub_pools
from llamafactory_kt.ground import machine, measurements
from llamafactory_kt.ground.machine import numa_nodes
from llamafactory_kt.model.memory import read_around

SHAPE = ExpertsShape(16, 2048, 1408)
MB = 2**20
PLANS = [Plan("AMXBF16", 1, 1), Plan("AMXBF16", 1, 2, idle_workers=True), Plan("oneDNN", 0, 2)]


@pytest.fixture(autouse=True)
def big_machine(monkeypatch, tmp_path):
    """16 cores in 2 NUMA nodes that can run everything, nothing remembered, no OMP_NUM_THREADS."""
    monkeypatch.setattr(plan, "usable_cores", lambda: 16)
    monkeypatch.setattr(plan, "physical_cores", len)
    monkeypatch.setattr(sub_pools, "usable_cores", lambda: 16)
    for module in (plan, sub_pools):
        monkeypatch.setattr(module, "numa_nodes", lambda: {0: set(range(8)), 1: set(range(8, 16))})
    monkeypatch.setattr(plan, "kernel_problem", lambda method: None)
    monkeypatch.setattr(plan, "require_kernel", lambda backend: None)
    monkeypatch.setattr(plan, "onednn_problem", lambda: None)
    monkeypatch.setenv("LLAMAFACTORY_KT_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)


def test_threads_chosen_and_clamped(kt_log):
    assert choose_threads(None, 1, on_gpu=False) == choose_threads(None, 1, on_gpu=True) == 8, "of one node"
    assert choose_threads(None, 2, on_gpu=True) == 14
    assert choose_threads(12, 2, on_gpu=False) == 12
    assert choose_threads(60, 2, on_gpu=False) == 15 and choose_threads(9, 1, on_gpu=False) == 8
    wanted = "kt_num_threads: {} is more than the {} cores that this process may use on {} of 2 NUMA node(s); using {}."
    assert kt_log.messages == [wanted.format(60, 16, 2, 15), wanted.format(9, 8, 1, 8)]
    for arguments in ((None, 3), (1, 2)):
        with pytest.raises(KTConfigError):
            choose_threads(*arguments, on_gpu=False)


def test_candidates(monkeypatch):
    def found(backend="auto", threads=None, on_gpu=False, idle=None, pools=None):
        config = KTExpertsConfig(backend=backend, num_threads=threads, idle_workers=idle, threadpool_count=pools)
        return [str(each) for each in candidates(config, on_gpu)]

    shared = "AMXBF16 with 15 idle-class worker(s) and 16 torch thread(s)"
    assert found() == ["AMXBF16 with 8 worker(s) and 8 torch thread(s)", shared, "oneDNN with 16 torch thread(s)"]
    assert found(pools=1) == [line.replace("15 idle", "8 idle") for line in found()], (
        "those of a sub-pool stay on its node"
    )
    assert found("AMXINT4") == [line.replace("BF16", "INT4") for line in found()[:2]]
    assert found("torch") == ["torch with 16 torch thread(s)"] and found("onednn") == ["oneDNN with 16 torch thread(s)"]
    assert found("AMXINT4", idle=True) == found("AMXINT4")[1:]
    assert found(idle=False) == [found()[0], found()[2]]
    asked = [
        "AMXBF16 with 12 worker(s) and 4 torch thread(s)",
        "AMXBF16 with 12 idle-class worker(s) and 16 torch thread(s)",
    ]
    assert found(threads=12) == asked, "a number that is asked for is taken, and means workers"
    assert found(threads=16) == ["AMXBF16 with 16 worker(s) and 1 torch thread(s)"], (
        "never as many idle workers as cores"
    )
    on_gpu = ["AMXBF16 with 14 worker(s) and 2 torch thread(s)", "oneDNN with 16 torch thread(s)"]
    assert found(on_gpu=True) == found(on_gpu=True, idle=True) == on_gpu
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    assert found() == ["AMXBF16 with 8 worker(s) and 3 torch thread(s)", "oneDNN with 3 torch thread(s)"], (
        "the user's number of torch threads stays"
    )


def test_candidates_where_something_is_missing(monkeypatch, kt_log):
    def found(merged):
        return [each.backend for each in candidates(KTExpertsConfig(merge_adapter=merged), False)]

    monkeypatch.setattr(plan, "kernel_problem", lambda method="AMXBF16": None if method == "AVX2BF16" else "no kernel")
    assert found(merged=False) == ["oneDNN"] and not kt_log.text
    assert candidates(KTExpertsConfig(num_threads=60), False) == [Plan("oneDNN", 0, 16)]
    assert kt_log.messages == ["kt_num_threads: 60 does nothing here: torch's threads compute the experts."]
    assert found(merged=True) == ["AVX2BF16", "AVX2BF16", "oneDNN"]
    monkeypatch.setattr(plan, "onednn_problem", lambda: "no oneDNN")
    assert found(merged=False) == ["torch"]
    assert "falls back to plain torch, which is slow: no kernel; no oneDNN" in kt_log.text
    assert found(merged=True) == ["AVX2BF16", "AVX2BF16"]
    with pytest.raises(KTConfigError, match="oneDNN cannot run here: no oneDNN"):
        candidates(KTExpertsConfig(backend="oneDNN"), False)


def test_affinity_and_cgroup_limit_the_cores(monkeypatch):
    for name, function in (("usable_cores", machine.usable_cores), ("numa_nodes", numa_nodes)):
        monkeypatch.setattr(plan, name, function)
    monkeypatch.setattr(sub_pools, "numa_nodes", numa_nodes)
    monkeypatch.setattr(machine.os, "sched_getaffinity", lambda _: {0})
    assert candidates(KTExpertsConfig(backend="AMXBF16"), False) == [Plan("AMXBF16", 1, 1)]
    monkeypatch.undo()
    monkeypatch.setattr(machine.os, "sched_getaffinity", lambda _: set(range(1000, 1064)))
    monkeypatch.setattr(machine, "cgroup_cpus", lambda: 2.5)
    assert machine.usable_cores() == 2


@pytest.fixture
def measuring(monkeypatch):
    """Times of PLANS instead of measured ones; counts the measurements."""
    calls = []

    def measure(facts, experts):
        calls.append(experts)
        return [Measured(0.036, 0.3), Measured(0.010, 0.2), Measured(0.011, 0.1)]

    monkeypatch.setattr(choosing, "_measure", measure)
    return calls


def chosen(shape=SHAPE, recalibrate=False, around=10 * MB):
    return choose(PLANS, shape, 6, 1, 512, around, recalibrate)


def test_the_fastest_is_chosen_and_remembered(measuring, monkeypatch):
    best, reason = chosen()
    assert best == PLANS[2], (
        "3.36 s for 256 tokens of answer and 512 of prompt against 3.22 s, though the token is slower"
    )
    assert reason.startswith("measured 11.0 ms a token") and reason.count("AMXBF16") == 2
    chosen()
    assert len(measuring) == 1
    chosen(recalibrate=True)
    assert len(measuring) == 2
    chosen(ExpertsShape(16, 2048, 1536))
    assert len(measuring) == 3, "another shape"
    chosen(around=30 * MB)
    chosen(around=0)
    chosen(around=31 * MB)
    assert len(measuring) == 5, "more weights around them, or none; as many whole products count as the same"
    monkeypatch.setattr(measurements, "cpu_name", lambda: "another CPU")
    chosen()
    assert len(measuring) == 6


@pytest.mark.parametrize("damage", ["", "[]", "{}", '{"facts": 1, "measured": []}', "other", "negative", "text"])
def test_a_damaged_or_foreign_memory_is_ignored(measuring, damage):
    chosen()
    (file,) = Path(os.environ["LLAMAFACTORY_KT_CACHE"], "calibration").iterdir()
    content = json.loads(file.read_text())
    if damage == "other":
        content["facts"]["machine"][0] = "another CPU"
    if damage in ("negative", "text"):
        content["measured"][0]["decode"] = -1 if damage == "negative" else "quick"
    file.write_text(json.dumps(content) if damage.isalpha() else damage)
    chosen()
    assert len(measuring) == 2 and json.loads(file.read_text())["measured"][0]["decode"] == 0.036


def test_nothing_is_measured_where_it_does_not_pay_or_cannot_be(measuring, monkeypatch, kt_log):
    assert chosen(ExpertsShape(16, 64, 96)) == (PLANS[0], "small layers, not measured")
    assert choose(PLANS[2:], SHAPE, 6, 1, 512, MB) == (PLANS[2], "")
    monkeypatch.setattr(choosing, "available_memory", lambda: 10**9)
    assert chosen()[0] == PLANS[0] and not measuring
    monkeypatch.undo()
    monkeypatch.setattr(choose.sys, "executable", "/bin/false")
    assert chosen(recalibrate=True)[0] == PLANS[0]
    assert "Measuring engines and threads failed (the measuring process ended with 1" in kt_log.text


@pytest.mark.parametrize("tied", [False, True])
def test_what_a_token_reads_around_the_experts(tmp_path, tied):
    """The calibration's products are as large; a tied embedding is read as the output layer."""
    path = make_model(tmp_path / "model", "qwen3_moe", tie_word_embeddings=tied)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
    parts = {name: parameter.nbytes for name, parameter in model.named_parameters()}
    read = [size for name, size in parts.items() if ".experts." not in name and (tied or "embed_tokens" not in name)]
    assert read_around(model, find_experts(model)) == sum(read)
    assert ("lm_head.weight" in parts) is not tied


@pytest.mark.parametrize("backend", [pytest.param("AMXBF16", marks=needs_kernel), "AVX2BF16"])
@needs_onednn
def test_measuring_for_real(monkeypatch, backend):
    monkeypatch.setattr(choosing, "SMALLEST_LAYER", 0)
    plans = [Plan(backend, 1, 1), PLANS[2]]
    best, reason = choose(plans, ExpertsShape(12, 256, 192), 3, 1, 64, MB, recalibrate=True)
    assert best in plans and reason.count("ms a token") == 2


def test_measured_in_turn():
    """As long as more than one may be the fastest: once where it is hopeless, twice where it is far, else three times."""
    calls: list[str] = []

    def measure(name: str, *times: tuple[float, float]):
        left = iter(times)

        def call() -> Measured:
            calls.append(name)
            return Measured(*next(left))

        return call

    hopeless, far = measure("hopeless", (1.6, 11)), measure("far", (1.4, 9), (1.3, 9))
    fast, near = measure("fast", (1, 8), (9, 1), (2, 3)), measure("near", (1.3, 11), (1.1, 12), (1.1, 9))
    best = [Measured(1.6, 11), Measured(1.3, 9), Measured(1, 8), Measured(1.1, 9)]
    assert in_turn([hopeless, far, fast, near]) == best
    assert calls == ["hopeless", "far", "fast", "near", "far", "fast", "near", "fast", "near"]
    calls.clear()
    assert in_turn([measure("slow", (5, 5)), measure("alone", (1, 1))]) == [Measured(5, 5), Measured(1, 1)]
    assert calls == ["slow", "alone"]


def test_what_a_measuring_process_answers(monkeypatch):
    """A token with all weights around, and a prompt of 128 from one with fewer tokens and three in twenty weights."""
    for name in ("die_with_parent", "_engine", "arrange"):
        monkeypatch.setattr(worker, name, lambda *_: None)
    for name in ("_SETTLE", "_TOKENS"):
        monkeypatch.setattr(worker, name, 0)
    monkeypatch.setattr(worker, "_layer", lambda *_: lambda tokens, around: (tokens * len(around), tokens * 0.5))
    ours, theirs = multiprocessing.Pipe()
    for message in ("your turn", None):
        ours.send(message)
    task = {"experts": 16, "layer": [64, 8, 8, 2, 1, 512]}
    worker._serve(theirs, Plan("oneDNN", 0, 2), task, torch.empty(20, 8, 8))
    assert ours.recv() == "ready" and ours.recv() == (20 + 0.5, 128 * (20 + 0.5))


def test_the_measuring_process_imports_little():
    """transformers takes longer to import than measuring takes."""
    code = "import sys, llamafactory_kt.autotune.worker; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_measuring_process_that_fails_says_why():
    facts = {"layer": [4, -1, 8, 1, 1, 8], "products": 0, "plans": [asdict(plan) for plan in PLANS[2:]]}
    with pytest.raises(ValueError, match=r"ended with 1: RuntimeError: .* negative dimension -1"):
        choosing._measure(facts, 4)


RUN = """
import os, pathlib, torch
from llamafactory_kt.autotune import apply as workers
from llamafactory_kt.engines.ktkernel.cpuinfer import settle_pool
from llamafactory_kt.autotune.plan import Plan
settle_pool(1, 1)
from kt_kernel.sft.amx import AMXSFTMoEWrapper
AMXSFTMoEWrapper._get_cpu_infer(1, 1)
def policies():
    tasks = pathlib.Path("/proc/self/task").iterdir()
    names = {int(task.name): (task / "comm").read_text() for task in tasks}
    return {os.sched_getscheduler(task) for task, name in names.items() if name.startswith("numa_")}
print(policies())
workers.arrange(Plan("AMXBF16", 1, 2, idle_workers=True))
print(policies(), torch.get_num_threads(), (torch.ones(100000) + 1).sum().item())
"""


@needs_kernel
def test_idle_workers():
    """In a process of its own: a thread in the idle class may not be allowed to leave it again."""
    done = subprocess.run([sys.executable, "-c", RUN], capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    assert lines == [f"{{{os.SCHED_OTHER}}}", f"{{{os.SCHED_IDLE}}} 2 200000.0"], done.stdout + done.stderr
