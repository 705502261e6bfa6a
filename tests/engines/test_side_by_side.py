"""Experts computed side by side: how they are divided, who computes them, and what happens to an error."""

from __future__ import annotations

import threading

import pytest
import torch

from llamafactory_kt.engines.onednn.schedule import Part, compute, parts, together
from llamafactory_kt.matmul.openmp import in_team
from llamafactory_kt.model import openmp, side_by_side

THREADS = 2


def test_parts():
    """Experts without rows have none, and those with many several of about as many rows."""
    assert parts([0, 3, 0, 1, 0], threads=2) == [Part(1, 0, 3), Part(3, 3, 4)]
    assert parts([90, 95, 160], threads=16) == [Part(0, 0, 90), Part(1, 90, 185), Part(2, 185, 265), Part(2, 265, 345)]
    assert [part.stop - part.start for part in parts([1000, 1, 47], threads=1)] == [250, 250, 250, 250, 1, 47]
    assert [part.stop - part.start for part in parts([1024, 128, 5], threads=4)] == [73, 73, 73, 73, 73, 73, 74] * 2 + [
        64,
        64,
        5,
    ]
    assert parts([0, 0], threads=2) == []


def test_together():
    every = [Part(0, 0, 4), Part(1, 4, 6), Part(2, 6, 20), Part(3, 20, 21)]
    assert list(together(every, most=6)) == [every[:2], [every[2]], [every[3]]]
    assert list(together(every, most=100)) == [every] and list(together([], most=1)) == []


@pytest.mark.parametrize(
    ("number", "threads", "alone"), [(6, 2, True), (3, 2, True), (1, 2, False), (9, 8, False), (6, 1, False)]
)
def test_few_experts_are_computed_by_all_threads(monkeypatch, number, threads, alone):
    teams: list[int] = []

    def team(work, size):
        teams.append(size)
        work()

    monkeypatch.setattr(side_by_side, "in_team", team)
    some, computed = [Part(expert, expert, 2 * expert + 1) for expert in range(number)], []
    monkeypatch.setattr(side_by_side, "_ROWS", 1)
    compute(some, threads, lambda *given: computed.append(given))
    assert teams == [threads] * alone
    if alone:
        assert computed == [([part], 1) for part in reversed(some)], "the longest first"
    else:
        assert computed == [(few, threads) for few in together(some, threads)]


def test_in_a_team():
    """Each of its threads calls, in inference mode, and computes its products by itself."""
    before = torch.get_num_threads()
    seen, meet = set(), threading.Barrier(THREADS, timeout=20)
    openmp_ = openmp._torchs()

    def work():
        meet.wait()
        seen.add(
            (
                threading.get_ident(),
                torch.is_inference_mode_enabled(),
                openmp_.omp_in_parallel(),
                openmp_.omp_get_num_threads(),
            )
        )

    in_team(work, THREADS)
    assert len(seen) == THREADS and {entry[1:] for entry in seen} == {(True, 1, THREADS)}
    assert threading.get_ident() in {entry[0] for entry in seen}
    assert not torch.is_inference_mode_enabled() and torch.get_num_threads() == before


def test_an_error_in_a_team_is_raised():
    def work():
        raise ValueError("in a thread of OpenMP's")

    with pytest.raises(ValueError, match="thread of OpenMP's"):
        in_team(work, THREADS)


def test_a_torch_without_libgomp(monkeypatch):
    monkeypatch.setattr(openmp, "_torchs", object)
    calls: list[int] = []
    in_team(lambda: calls.append(threading.get_ident()), 8)
    assert calls == [threading.get_ident()]
