"""The order in which configurations are measured, and those that cannot be."""

from __future__ import annotations

from contextlib import contextmanager

import pytest

from llamafactory_kt import KTConfigError
from llamafactory_kt.tools.bench import rounds
from llamafactory_kt.tools.bench.configs import BenchConfig, bench_configs
from llamafactory_kt.tools.bench.results import LoadStats
from llamafactory_kt.tools.bench.rounds import bench

CONFIG = {"model_name_or_path": "m", "adapter_name_or_path": "a", "use_kt": True, "kt_backend": "torch"}
GIB = 2**30
LOADED = LoadStats("torch; torch 2", 2.0, 1 * GIB, 4 * GIB, 5 * GIB, 2 * GIB, 500_000_000, 250_000_000, push=0.25)


def test_each_round_begins_with_another_configuration(monkeypatch):
    """What comes first after a pause, or after the memory was read, is not always the same."""
    asked: list[str] = []

    @contextmanager
    def worker(name, *_):
        def ask(*words):
            if name == "memory bandwidth":
                return 50e9
            if words == ("end",):
                return 6 * GIB, 0
            asked.append(f"{name[:2]} {words[0]}")
            return len(asked), len(asked), None

        yield LOADED, ask

    monkeypatch.setattr(rounds, "_worker", worker)
    report = rounds.bench(bench_configs(CONFIG, ["stock"]), [128, 9], rounds=4)
    one, two, three = (["as", "ba", "st"][n:] + ["as", "ba", "st"][:n] for n in range(3))
    assert asked == [f"{name} {length}" for names in (one, two, three, one) for length in (128, 9) for name in names]
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
