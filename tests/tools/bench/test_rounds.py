"""The order in which configurations are measured, and those that cannot be."""

from __future__ import annotations

from contextlib import contextmanager

import pytest

from llamafactory_kt import KTConfigError
from llamafactory_kt.tools.bench import rounds
from llamafactory_kt.tools.bench.configs import BenchConfig, bench_configs
from llamafactory_kt.tools.bench.results import ForwardParts, LoadStats, PartsResult, Speeds
from llamafactory_kt.tools.bench.rounds import bench
from llamafactory_kt.tools.bench.speed import Speed

CONFIG = {"model_name_or_path": "m", "adapter_name_or_path": "a", "use_kt": True, "kt_backend": "torch"}
GIB = 2**30
LOADED = LoadStats("torch; torch 2", 2.0, 1 * GIB, 4 * GIB, 5 * GIB, 2 * GIB, 500_000_000, 250_000_000, push=0.25)


@pytest.fixture
def asked(monkeypatch) -> list[str]:
    """What the workers are asked: a configuration answers with how much it was asked, the machine's speed is how often it was."""
    asked: list[str] = []
    part = ForwardParts(1.0, {})

    @contextmanager
    def worker(name, *_):
        def ask(*words):
            if name == "the machine's speed":
                asked.append("speed")
                return Speed(asked.count("speed"), 0)
            if words == ("end",):
                return 6 * GIB, 0, 5 * GIB, 3 * GIB
            if words == ("go on",):
                asked.append("go on")
                return answers.pop()
            asked.append(f"{name[:2]} {words[0]}")
            number = sum("speed" != ask != "go on" for ask in asked)
            answers.append(PartsResult(part, part, 1.0) if words[2] else (number, number, None, None))
            return True

        yield LOADED, ask

    answers: list[object] = []
    monkeypatch.setattr(rounds, "worker", worker)
    return asked


def test_the_machine_is_measured_around_each_figure(asked):
    report = rounds.bench(bench_configs(CONFIG), [128], rounds=1)
    turn = ["speed", "go on", "speed"]
    assert asked == ["speed", "as 128", *turn, "ba 128", *turn, "as 128", *turn, "ba 128", *turn]
    around = [[Speed(number, 0) for number in numbers] for numbers in ((1, 2, 3), (3, 4, 5), (5, 6, 7), (7, 8, 9))]
    assert [row.speeds[128] for row in report.rows] == [[Speeds(*around[0])], [Speeds(*around[1])]]
    assert [row.parts[128].speeds for row in report.rows] == [Speeds(*around[2]), Speeds(*around[3])]
    assert report.machine.bandwidth == list(range(1, 10))
    assert [(row.peak, row.resident, row.proportional) for row in report.rows] == [(6 * GIB, 5 * GIB, 3 * GIB)] * 2


def test_each_round_begins_with_another_configuration(asked):
    """What comes first after a pause, or after the memory was read, is not always the same."""
    report = rounds.bench(bench_configs(CONFIG, ["stock"]), [128, 9], rounds=4, parts=False)
    turns = [ask for ask in asked if ask not in ("speed", "go on")]
    one, two, three = (["as", "ba", "st"][n:] + ["as", "ba", "st"][:n] for n in range(3))
    assert turns == [f"{name} {length}" for names in (one, two, three, one) for length in (128, 9) for name in names]
    assert [m.decode[128] for m in report.rows] == [[1, 9, 14, 19], [2, 7, 15, 20], [3, 8, 13, 21]]


def test_a_configuration_that_cannot_be_loaded(tmp_path):
    config = {**CONFIG, "model_name_or_path": str(tmp_path / "none"), "adapter_name_or_path": None}
    with pytest.raises(KTConfigError, match=r"x cannot be measured: .*model_name_or_path: .*/none does not exist"):
        bench([BenchConfig("x", config)])


def test_keys_of_later_rows_are_checked_before_anything_is_loaded(demo):
    config = {**CONFIG, "model_name_or_path": str(demo / "model"), "adapter_name_or_path": None}
    wrong = {**config, "kt_backend": "AMXINT8"}
    with pytest.raises(KTConfigError, match=r"kt_backend=AMXINT8 cannot be measured: .*needs kt_weight_path"):
        bench(
            [BenchConfig("as configured", config), BenchConfig("kt_backend=AMXINT8", wrong)],
            tick=lambda: pytest.fail("loaded"),
        )
