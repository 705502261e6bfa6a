"""How kt-kernel's workers and PyTorch's threads share the cores."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from helpers.machines import pretend_machine
from helpers.marks import needs_kernel

from llamafactory_kt import KTConfigError
from llamafactory_kt.engines.ktkernel.plans import choose_workers, plans
from llamafactory_kt.engines.plan import Plan, PlanRequest
from llamafactory_kt.ground import machine


def test_threads_chosen_and_clamped(monkeypatch, kt_log):
    pretend_machine(monkeypatch)
    assert choose_workers(None, 1, on_gpu=False) == choose_workers(None, 1, on_gpu=True) == 8, "of one node"
    assert choose_workers(None, 2, on_gpu=True) == 14
    assert choose_workers(12, 2, on_gpu=False) == 12
    assert choose_workers(60, 2, on_gpu=False) == 15 and choose_workers(9, 1, on_gpu=False) == 8
    wanted = "kt_num_threads: {} is more than the {} cores that this process may use on {} of 2 NUMA node(s); using {}."
    assert kt_log.messages == [wanted.format(60, 16, 2, 15), wanted.format(9, 8, 1, 8)]
    with pytest.raises(KTConfigError, match="3 sub-pools asked for, this process may use 2 NUMA node"):
        choose_workers(None, 3, on_gpu=False)


def test_affinity_and_cgroup_limit_the_cores(monkeypatch):
    monkeypatch.setattr(machine.os, "sched_getaffinity", lambda _: {0})
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert plans("AMXBF16", PlanRequest()) == [Plan("AMXBF16", 1, 1)]
    monkeypatch.undo()
    monkeypatch.setattr(machine.os, "sched_getaffinity", lambda _: set(range(1000, 1064)))
    monkeypatch.setattr(machine, "cgroup_cpus", lambda: 2.5)
    assert machine.usable_cores() == 2


RUN = """
import os, pathlib, torch
from llamafactory_kt.engines.base import EngineOptions
from llamafactory_kt.engines.ktkernel.cpuinfer import worker_pool
from llamafactory_kt.engines.plan import Plan
from llamafactory_kt.engines.registry import get_engine
def policies():
    tasks = pathlib.Path("/proc/self/task").iterdir()
    names = {int(task.name): (task / "comm").read_text() for task in tasks}
    return {os.sched_getscheduler(task) for task, name in names.items() if name.startswith("numa_")}
engine, plan = get_engine("AMXBF16"), Plan("AMXBF16", 1, 2, idle_workers=True)
engine.start(plan, EngineOptions())
worker_pool()
print(policies())
engine.arrange_process(plan)
print(policies(), torch.get_num_threads(), (torch.ones(100000) + 1).sum().item())
"""


@needs_kernel
def test_idle_workers():
    """In a process of its own, as a thread may not be allowed to leave the idle class again."""
    done = subprocess.run([sys.executable, "-c", RUN], capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    assert lines == [f"{{{os.SCHED_OTHER}}}", f"{{{os.SCHED_IDLE}}} 2 200000.0"], done.stdout + done.stderr
