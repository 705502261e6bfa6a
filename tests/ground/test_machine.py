"""What this process may use of the machine."""

from __future__ import annotations

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
