"""Choosing the fastest plan: what is measured, remembered, and measured again."""

from __future__ import annotations

import json

import pytest
from helpers.marks import needs_kernel, needs_onednn

from llamafactory_kt.adapters import ExpertsShape
from llamafactory_kt.autotune import choose as choosing
from llamafactory_kt.autotune.choose import PlanTimes, choose
from llamafactory_kt.engines.options import EngineOptions
from llamafactory_kt.engines.plan import Plan
from llamafactory_kt.ground import measurements
from llamafactory_kt.ground.progress import MeasureProgress, watch_loads

SHAPE = ExpertsShape(16, 2048, 1408)
MB = 2**20
PLANS = [Plan("AMXBF16", 1, 1), Plan("AMXBF16", 1, 2, idle_workers=True), Plan("oneDNN", 0, 2)]
TIMES = [PlanTimes(0.036, 0.3), PlanTimes(0.010, 0.2), PlanTimes(0.011, 0.1)]


@pytest.fixture(autouse=True)
def nothing_is_remembered(cache):
    """Each test starts without remembered measurements."""


@pytest.fixture
def measuring(monkeypatch):
    """Returns TIMES instead of measuring; the list gets an entry for each measurement."""
    calls = []

    def measure(facts, experts):
        calls.append((facts, experts))
        return TIMES

    monkeypatch.setattr(choosing, "_measure", measure)
    monkeypatch.setattr(choosing, "load_of_cores", lambda: 0.1)
    return calls


def chosen(shape=SHAPE, recalibrate=False, around=10 * MB, plans=PLANS):
    return choose(plans, shape, 6, EngineOptions(), around, recalibrate)


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
def test_a_damaged_or_foreign_memory_is_ignored(measuring, cache, damage):
    chosen()
    (file,) = (cache.parent / "calibration").iterdir()
    content = json.loads(file.read_text())
    if damage == "other":
        content["facts"]["machine"][0] = "another CPU"
    if damage in ("negative", "text"):
        content["measured"]["plans"][0]["decode"] = -1 if damage == "negative" else "quick"
    file.write_text(json.dumps(content) if damage.isalpha() else damage)
    chosen()
    assert len(measuring) == 2 and json.loads(file.read_text())["measured"]["plans"][0]["decode"] == 0.036


def test_what_was_measured_on_a_busy_machine_is_measured_again(measuring, monkeypatch):
    load = [9.0]
    monkeypatch.setattr(choosing, "load_of_cores", lambda: load[0])
    for busy, times in ((9.0, 1), (8.0, 1), (0.2, 2), (0.2, 2), (9.0, 2)):
        load[0] = busy
        _, reason = chosen()
        assert len(measuring) == times and ("kept the machine busy" in reason) == (times == 1)


def test_nothing_is_measured_where_it_does_not_pay_or_cannot_be(measuring, monkeypatch, kt_log):
    assert chosen(ExpertsShape(16, 64, 96)) == (PLANS[0], "small layers, not measured")
    assert chosen(plans=PLANS[2:]) == (PLANS[2], "")
    monkeypatch.setattr(choosing, "available_memory", lambda: 10**9)
    assert chosen()[0] == PLANS[0] and not measuring
    monkeypatch.undo()
    monkeypatch.setattr("sys.executable", "/bin/false")
    assert chosen(recalibrate=True)[0] == PLANS[0]
    assert "Measuring engines and threads failed (the measuring process ended with 1" in kt_log.text


@pytest.mark.parametrize("backend", [pytest.param("AMXBF16", marks=needs_kernel), "AVX2BF16"])
@needs_onednn
def test_measuring_for_real(monkeypatch, backend):
    monkeypatch.setattr(choosing, "SMALLEST_LAYER", 0)
    plans = [Plan(backend, 1, 1), PLANS[2]]
    told = []
    with watch_loads(told.append):
        best, reason = choose(plans, ExpertsShape(12, 256, 192), 3, EngineOptions(max_chunk=64), MB, recalibrate=True)
    assert best in plans and reason.count("ms a token") == 2
    assert told[:2] == [MeasureProgress(1, 2), MeasureProgress(2, 2)]


def test_a_measuring_process_that_fails_says_why(kt_log):
    plans = [Plan("unheard-of", 0, 1), PLANS[2]]
    assert chosen(plans=plans, around=0) == (plans[0], "measuring failed")
    assert "the measuring process ended with 1: " in kt_log.text
    assert "KTConfigError: kt_backend: unknown value 'unheard-of'" in kt_log.text
