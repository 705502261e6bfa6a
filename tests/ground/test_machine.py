"""What this process may use of the machine."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest

from llamafactory_kt.ground import machine


def test_numa_nodes_that_this_process_may_use(monkeypatch, tmp_path):
    for node, cpus in enumerate(("0-3,8-11\n", "4-7,12-15\n", "\n")):
        (tmp_path / f"node{node}").mkdir()
        (tmp_path / f"node{node}" / "cpulist").write_text(cpus)
    monkeypatch.setattr(machine, "Path", lambda _: tmp_path)
    for allowed, wanted in (
        (set(range(16)), {0: {0, 1, 2, 3, 8, 9, 10, 11}, 1: {4, 5, 6, 7, 12, 13, 14, 15}}),
        ({5, 12}, {1: {5, 12}}),
        ({99}, {0: {99}}),
    ):
        monkeypatch.setattr(machine.os, "sched_getaffinity", lambda _, cpus=allowed: cpus)
        assert machine.numa_nodes() == wanted


GIB = 2**30


@pytest.mark.parametrize(
    ("own", "files"),
    [
        ("0::/box/chat\n", {
            "box/memory.max": 8 * GIB, "box/memory.current": 7 * GIB, "box/memory.stat": f"anon 5\ninactive_file {GIB}\nactive_file {2 * GIB}",
            "box/chat/memory.max": "max", "box/chat/memory.current": GIB, "box/chat/memory.stat": "inactive_file 0",
            "box/cpu.max": "150000 100000", "box/chat/cpu.max": "max 100000",
        }),
        ("5:cpu,cpuacct:/box/chat\n4:memory:/box/chat\n0::/\n", {
            "memory/box/memory.limit_in_bytes": 8 * GIB, "memory/box/memory.usage_in_bytes": 7 * GIB,
            "memory/box/memory.stat": f"inactive_file 0\nactive_file 0\ntotal_inactive_file {GIB}\ntotal_active_file {2 * GIB}",
            "memory/box/chat/memory.limit_in_bytes": 9223372036854771712, "memory/box/chat/memory.usage_in_bytes": GIB,
            "memory/box/chat/memory.stat": "total_inactive_file 0",
            "cpu/box/cpu.cfs_quota_us": 150000, "cpu/box/cpu.cfs_period_us": 100000, "cpu/box/chat/cpu.cfs_quota_us": -1,
        }),
    ],
    ids=["version 2", "version 1"],
)  # fmt: skip
def test_limits_of_a_cgroup(monkeypatch, tmp_path, own, files):
    for name, content in {"proc/self/cgroup": own, **{f"sys/fs/cgroup/{n}": c for n, c in files.items()}}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(str(content))
    monkeypatch.setattr(machine, "Path", lambda path: tmp_path / path.lstrip("/"))
    monkeypatch.setattr(machine.psutil, "virtual_memory", lambda: SimpleNamespace(available=64 * GIB))
    assert machine.cgroup_memory() == 8 * GIB and machine.available_memory() == 4 * GIB
    assert machine.cgroup_cpus() == 1.5
    (tmp_path / "proc/self/cgroup").unlink()
    assert machine.available_memory() == 64 * GIB and machine.cgroup_cpus() == machine.cgroup_memory() == math.inf
