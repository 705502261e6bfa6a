"""Machines that tests pretend to run on."""

from __future__ import annotations

import pytest

from llamafactory_kt.engines import plan
from llamafactory_kt.engines.ktkernel import plans, sub_pools
from llamafactory_kt.engines.registry import engines, get_engine


def pretend_machine(monkeypatch: pytest.MonkeyPatch, cores: int = 16, nodes: int = 2) -> None:
    """Have this many cores, spread evenly over this many NUMA nodes."""
    size = cores // nodes
    divided = {node: set(range(node * size, (node + 1) * size)) for node in range(nodes)}
    for module in (plan, plans, sub_pools):
        monkeypatch.setattr(module, "usable_cores", lambda: cores)
    for module in (plans, sub_pools):
        monkeypatch.setattr(module, "numa_nodes", lambda: divided)
    monkeypatch.setattr(plans, "physical_cores", len)


def pretend_any_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have all that a configuration may ask for."""
    pretend_machine(monkeypatch, cores=256, nodes=8)
    pretend_problem(monkeypatch, None, *(engine.name for engine in engines()))


def pretend_problem(monkeypatch: pytest.MonkeyPatch, problem: str | None, *engines: str) -> None:
    """Let these engines not run, for this reason; or let them run, with None."""
    for name in engines:
        monkeypatch.setattr(get_engine(name), "problem", classmethod(lambda cls: problem))
