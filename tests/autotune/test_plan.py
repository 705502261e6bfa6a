"""The plans that a load chooses from."""

from __future__ import annotations

import pytest
import torch
from helpers.machines import pretend_machine, pretend_problem

from llamafactory_kt import KTExpertsConfig, KTKernelError
from llamafactory_kt.autotune.plan import candidates
from llamafactory_kt.engines.plan import Plan
from llamafactory_kt.engines.registry import engines


@pytest.fixture(autouse=True)
def big_machine(monkeypatch):
    """16 cores on 2 NUMA nodes, where every engine runs, and no OMP_NUM_THREADS."""
    pretend_machine(monkeypatch)
    pretend_problem(monkeypatch, None, *(engine.name for engine in engines()))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)


def found(on_gpu=False, **keys):
    config = KTExpertsConfig(**keys)
    return [
        str(plan)
        for plan in candidates(config.backend, config.plan_request(on_gpu), merged=config.merge_adapter)
    ]  # fmt: skip


def test_candidates(monkeypatch):
    shared = "AMXBF16 with 15 idle-class worker(s) and 16 torch thread(s)"
    every = ["AMXBF16 with 8 worker(s) and 8 torch thread(s)", shared, "native with 16 torch thread(s)"]
    assert found() == every, "nothing that oneDNN does better"
    of_a_node = [line.replace("15 idle", "8 idle") for line in every]
    assert found(threadpool_count=1) == of_a_node, "the workers of a sub-pool stay on its node"
    assert found(backend="AMXINT4") == [line.replace("BF16", "INT4") for line in every[:2]]
    assert found(backend="torch") == ["torch with 16 torch thread(s)"]
    assert found(backend="onednn") == ["oneDNN with 16 torch thread(s)"] and found(backend="Native") == every[2:]
    assert found(backend="AMXINT4", idle_workers=True) == found(backend="AMXINT4")[1:]
    assert found(idle_workers=False) == [every[0], *every[2:]]
    asked = [
        "AMXBF16 with 12 worker(s) and 4 torch thread(s)",
        "AMXBF16 with 12 idle-class worker(s) and 16 torch thread(s)",
    ]
    assert found(num_threads=12) == asked, "a number that is asked for is taken, and means workers"
    all_cores = ["AMXBF16 with 16 worker(s) and 1 torch thread(s)"]
    assert found(num_threads=16) == all_cores, "there are never as many idle workers as cores"
    on_gpu = ["AMXBF16 with 14 worker(s) and 2 torch thread(s)", *every[2:]]
    assert found(on_gpu=True) == found(on_gpu=True, idle_workers=True) == on_gpu
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    three = ["AMXBF16 with 8 worker(s) and 3 torch thread(s)", "native with 3 torch thread(s)"]
    assert found() == three, "the user's number of torch threads stays"


def test_candidates_where_something_is_missing(monkeypatch, kt_log):
    def backends(merged):
        return [line.split()[0] for line in found(merge_adapter=merged)]

    pretend_problem(monkeypatch, "no kernel", "AMXBF16", "AMXINT4", "AMXINT8")
    assert backends(merged=False) == ["native"] and not kt_log.text
    assert found(num_threads=60) == [str(Plan("native", 0, 16))]
    assert kt_log.messages == ["kt_num_threads: 60 does nothing here: torch's threads compute the experts."]
    assert backends(merged=True) == ["AVX2BF16", "AVX2BF16", "native"]
    pretend_problem(monkeypatch, "no compiler", "native")
    assert backends(merged=False) == ["oneDNN"] and backends(merged=True) == ["AVX2BF16", "AVX2BF16", "oneDNN"]
    pretend_problem(monkeypatch, "no oneDNN", "oneDNN")
    assert backends(merged=False) == ["torch"]
    assert "falls back to plain torch, which is slow: no kernel; no compiler; no oneDNN" in kt_log.text
    assert backends(merged=True) == ["AVX2BF16", "AVX2BF16"]
    with pytest.raises(KTKernelError, match="oneDNN cannot run here: no oneDNN"):
        found(backend="oneDNN")
