"""Weights on the memory of all NUMA nodes. Where there is one, the system's answer is about that one."""

from __future__ import annotations

import ctypes

import pytest
import torch

from llamafactory_kt import load_report
from llamafactory_kt.ground import machine, paging
from llamafactory_kt.ground.paging import empty_in_huge_pages
from llamafactory_kt.tools.doctor import machine as doctor

HERE = list(machine.numa_nodes())
INTERLEAVE, BIND = 3, 2
"""modes of linux/mempolicy.h"""

pytestmark = pytest.mark.skipif(paging.is_refused(), reason="this container may not place memory")


@pytest.fixture
def two_nodes(monkeypatch, tmp_path):
    for node in (0, 1):
        (tmp_path / f"node{node}").mkdir()
        (tmp_path / f"node{node}" / "cpulist").write_text(f"{node}\n")
    monkeypatch.setattr(machine, "Path", lambda _: tmp_path)
    monkeypatch.setattr(machine.os, "sched_getaffinity", lambda _: {0, 1})


def weights() -> torch.Tensor:
    """Larger than what glibc keeps for later, with the policy that it had."""
    return empty_in_huge_pages((3, 2**23), torch.bfloat16)


@pytest.mark.usefixtures("two_nodes")
def test_pages_of_weights_take_turns():
    around = torch.ones(2**20)
    copied = weights()
    for page in range(0, copied.nbytes, 2**21):
        assert paging.policy(copied.data_ptr() + page) == (INTERLEAVE, [node for node in (0, 1) if node in HERE])
    assert paging.policy(around.data_ptr()) == (0, [])
    assert (copied.fill_(2) == 2).all()


@pytest.mark.skipif(len(HERE) > 1, reason="several nodes here")
def test_nothing_happens_on_one_node():
    copied = weights()
    assert paging.policy(copied.data_ptr()) == (0, []) and paging.spread_over() == [] and not list(doctor.numa())


@pytest.mark.usefixtures("two_nodes")
def test_a_policy_that_the_process_has_got_counts():
    def bind(mode: int, nodes: int) -> int:  # set_mempolicy(2), for this thread
        mask = ctypes.c_ulong(nodes)
        number = {237: 238, 235: 237}[paging._MBIND]
        return ctypes.CDLL(None).syscall(
            ctypes.c_long(number), ctypes.c_int(mode), ctypes.byref(mask), ctypes.c_ulong(64)
        )

    assert bind(BIND, 1 << HERE[0]) == 0
    try:
        assert paging.policy() == (BIND, HERE[:1]) and paging.spread_over() == []
        assert "as the process's memory policy says" in next(iter(doctor.numa())).text
        copied = weights()
        assert paging.policy(copied.data_ptr())[0] != INTERLEAVE
    finally:
        assert bind(0, 0) == 0


@pytest.mark.usefixtures("two_nodes")
def test_what_the_system_refuses(monkeypatch):
    assert "take turns over them" in next(iter(doctor.numa())).text
    memory = torch.empty(2**22)
    paging.interleave(memory.data_ptr() + 1, 2**20, [0])  # not a page's address: an error, which is none of ours
    monkeypatch.setattr(paging, "_MBIND", -1)
    monkeypatch.setattr(paging, "_GET_MEMPOLICY", -1)
    assert (weights().fill_(1) == 1).all() and paging.is_refused() and paging.spread_over() == []
    [finding] = doctor.numa()
    assert finding.status is doctor.warning("", "", "").status and "SYS_NICE" in finding.advice


def test_the_load_table_names_the_nodes(monkeypatch, tmp_path):
    from helpers.loading import load
    from helpers.models import make_model

    model = load(make_model(tmp_path / "model", "mixtral"), "native", load="copy")
    monkeypatch.setattr(load_report, "spread_over", lambda: [0, 2])
    found = dict(load_report.load_rows(model))["Weights"]
    assert found == "copied into huge pages, which take turns over the NUMA nodes 0, 2"
