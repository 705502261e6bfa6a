"""The process that measures plans."""

from __future__ import annotations

import multiprocessing
import subprocess
import sys
from types import SimpleNamespace

import torch

from llamafactory_kt.autotune import worker
from llamafactory_kt.autotune.choose import PlanTimes
from llamafactory_kt.autotune.worker import in_turn
from llamafactory_kt.engines.plan import Plan


def test_measured_in_turn():
    """Plans are measured again while more than one may still be the fastest: once if hopeless, twice if slow, else
    three times."""
    calls: list[str] = []

    def measure(name: str, *times: tuple[float, float]):
        left = iter(times)

        def call() -> PlanTimes:
            calls.append(name)
            return PlanTimes(*next(left))

        return call

    hopeless, far = measure("hopeless", (1.6, 11)), measure("far", (1.4, 9), (1.3, 9))
    fast, near = measure("fast", (1, 8), (9, 1), (2, 3)), measure("near", (1.3, 11), (1.1, 12), (1.1, 9))
    best = [PlanTimes(1.6, 11), PlanTimes(1.3, 9), PlanTimes(1, 8), PlanTimes(1.1, 9)]
    assert in_turn([hopeless, far, fast, near]) == best
    assert calls == ["hopeless", "far", "fast", "near", "far", "fast", "near", "fast", "near"]
    calls.clear()
    assert in_turn([measure("slow", (5, 5)), measure("alone", (1, 1))]) == [PlanTimes(5, 5), PlanTimes(1, 1)]
    assert calls == ["slow", "alone"]


def test_what_a_measuring_process_answers(monkeypatch):
    """The time of a token with all the weights around it; and of a prompt of 128, scaled up from fewer tokens and three
    of twenty weights.

    Real times would not show whether they are scaled correctly, so this replaces private functions by made-up ones.
    """
    monkeypatch.setattr(worker, "die_with_parent", lambda: None)
    monkeypatch.setattr(worker, "_engine", lambda *_: SimpleNamespace(arrange_process=lambda plan: None))
    monkeypatch.setattr(worker, "_layer", lambda *_: lambda tokens, around: (tokens * len(around), tokens * 0.5))
    for pause in ("_SETTLE", "_TOKENS"):
        monkeypatch.setattr(worker, pause, 0)
    ours, theirs = multiprocessing.Pipe()
    for message in ("your turn", None):
        ours.send(message)
    task = {"experts": 16, "layer": [64, 8, 8, 2], "options": [1, 512]}
    worker._serve(theirs, Plan("oneDNN", 0, 2), task, torch.empty(20, 8, 8))
    assert ours.recv() == "ready" and ours.recv() == (20 + 0.5, 128 * (20 + 0.5))


def test_the_measuring_process_imports_little():
    """Importing transformers would take longer than measuring does."""
    code = "import sys, llamafactory_kt.autotune.worker; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
