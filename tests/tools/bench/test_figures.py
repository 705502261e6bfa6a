"""The arithmetic of ``bench`` on made-up figures, and the tables that show it."""

from __future__ import annotations

import io
import json
from dataclasses import replace

import pytest
from rich.console import Console

from llamafactory_kt.tools.bench.results import (
    BenchMachine,
    BenchReport,
    ConfigResult,
    ForwardParts,
    LoadStats,
    PartsResult,
    SecondTurn,
    Speeds,
    Spread,
    ratio,
)
from llamafactory_kt.tools.bench.speed import Speed
from llamafactory_kt.tools.bench.tables import show

GIB = 2**30
LOADED = LoadStats("torch; torch 2", 2.0, 1 * GIB, 4 * GIB, 5 * GIB, 2 * GIB, 500_000_000, 250_000_000, push=0.25)
LOADED = replace(LOADED, layers=4, cache={128: 250_000_000}, operations={128: {"linear": 1e10, "experts": 3e10}})
SLOW, FAST = [0.2, 0.4, 0.2], [0.1, 0.2, 0.05]


def made_up() -> BenchReport:
    """In the second round the machine was twice as slow, and its memory too."""
    stock = replace(LOADED, engine="transformers", load=1.0, resident=3 * GIB, push=None)
    speeds = {128: [around(50), around(25), around(50)]}
    prompt = ForwardParts.of([(0.4, {"attention": 0.1, "linear": 0.1, "experts": 0.1, "output": 0.02})])
    tokens = [
        (0.2, {"experts": 0.1, "output": 0.03}),
        (0.3, {"experts": 0.12, "output": 0.05}),
        (0.2, {"experts": 0.2, "output": 0.0}),
    ]
    parts = {128: PartsResult(prompt, ForwardParts.of(tokens), 0.16, around(40))}
    return BenchReport(
        BenchMachine("a CPU", 4, [50e9, 25e9, 50e9], checkpoint=8_000_000_000, products=[2e11, 4e11, 4e11]),
        [
            ConfigResult(
                "as configured", LOADED, [2.0, 6.0], {128: SLOW}, {128: SLOW}, speeds, parts, [0.0, 0.9, 0.01], 6 * GIB, 7 * GIB,
                5 * GIB, 3 * GIB, {128: [SecondTurn(0.6, 0.5), SecondTurn(0.4, 0.4), SecondTurn(0.5, 0.4)]},
            ),
            ConfigResult("stock", stock, [1.0, 2.0], {128: FAST}, {128: FAST}, speeds, parts, [0.4, 0.3], 6 * GIB),
        ],
    )  # fmt: skip


def around(reads: float) -> Speeds:
    """Memory in GB/s, with this mean while tokens are computed, and a CPU that becomes slower, with 400 GFLOP/s for the prompt."""
    before, between, after = ((reads + 30, 500), (reads - 10, 300), (reads + 10, 100))
    return Speeds(*(Speed(bytes_ * 1e9, operations * 1e9) for bytes_, operations in (before, between, after)))


def test_ratios_are_of_the_same_round():
    """The middle of SLOW over the middle of FAST would be 2 as well; the spread tells the pairs."""
    assert ratio(SLOW, FAST) == Spread(2.0, 2.0, 4.0) and ratio(FAST, SLOW) == Spread(0.5, 0.25, 0.5)
    with pytest.raises(ValueError, match="shorter"):
        ratio(SLOW, FAST[:2])
    report = made_up()
    configured, stock = report.references
    assert report.ratios(stock, configured) == {
        "decode speed after 128": Spread(2.0, 2.0, 4.0),
        "prefill speed, 128 tokens": Spread(2.0, 2.0, 4.0),
        "load time": Spread((1 / 2 + 1 / 3) / 2, 1 / 3, 1 / 2),
        "memory": Spread(2 / 3, 2 / 3, 2 / 3),
    }


def test_figures_of_one_row():
    report = made_up()
    configured, stock = report.rows
    assert configured.added == 3 * GIB and configured.over_weights == 1.5
    assert report.floor(configured) == Spread(0.01, 0.01, 0.02), "0.5 GB at 50, 25 and 50 GB/s"
    assert report.token_bytes(configured, 128) == 1_000_000_000
    share = report.bandwidth_share(configured, 128)
    assert (share.median, share.low, share.high) == pytest.approx((0.1, 0.1, 0.1)), "1 GB at 50, 25 and 50 GB/s"
    share = report.peak_share(configured, 128)
    assert (share.median, share.low, share.high) == pytest.approx((0.5, 0.25, 0.5)), "40 GFLOP at 400 GFLOP/s"
    assert report.timing_costs(configured, 128) == pytest.approx((0.4 / 0.2, 0.2 / 0.16))
    assert report.load_rate(configured) == 8e9 / 4.0 / 4
    assert not configured.restless and stock.restless


def test_what_is_shown():
    out = io.StringIO()
    show(made_up(), Console(file=out, width=160))
    text = " ".join(out.getvalue().split())
    assert text.index("Ratios of the same round") < text.index("Figures")
    for part in (
        "against as configured │ │ │ │ decode speed after 128 │ 1 │ 2.00 (2.00-4.00)", "against stock", "0.50 (0.25-0.50) │ 1",
        "load time │ 1 │ 0.42 (0.33-0.50)", "200 (200-400) ms │ 100 (50-200) ms", "5.0 (2.5-5.0) │ 10.0 (5.0-20.0)",
        "added over weights │ 1.50 │ 1.00", "250.0 ms │ -", "0.50 GB/s │ 1.33 GB/s", "reads 50.0 (25.0-50.0) GB/s",
        "peak on GPU │ 7.0 GiB", "of the CPU's peak │ 50 (25-50) %", "of the memory's bandwidth │ 10 % │ 20 (20-40) %",
        "before / after, GB/s │ 40.0 / 60.0 │", "turn 2, 32 tokens more │ 500 (400-600) ms, 1.20 (1.00-1.25) of these alone │ - │", "read a token │ 953.7 MiB", "resident, all loaded │ 5.0 GiB",
        "(PSS) │ 3.0 GiB │ -", "multiplies with 400 (200-400) GFLOP/s",
        # each part's median, and the medians of what is left of each token
        "a token after 128 │ 200.0 ms │ 200.0 ms │ │ experts │ 120.0 ms, 30.00 a layer │", "output │ 30.0 ms │ 30.0 ms",
        "between │ 70.0 ms, 17.50 a layer │", "before / after, GB/s │ 30.0 / 50.0", "timed by part / plain │ 1.25 │ 1.25",
        "a prompt of 128 │ 400 ms │ 400 ms │ │ attention │ 25.0 % │", "between │ 20.0 % │", "plain │ 2.00 │ 4.00", "stock kept 0.35 cores busy while others were measured",
    ):  # fmt: skip
        assert part in text, (part, text)
    assert "as configured kept" not in text
    assert json.loads(json.dumps(made_up().to_dict()))["ratios"]["stock"]["as configured"]["memory"]["median"] == 1.5


def test_all_of_it_is_in_the_json():
    row = json.loads(json.dumps(made_up().to_dict()))["rows"][0]
    assert row["bytes_per_token"] == {"128": 1_000_000_000} and row["speeds"]["128"][1]["after"]["reads"] == 35e9
    assert row["bandwidth_share"]["128"]["median"] == pytest.approx(0.1)
    assert row["peak_share"]["128"]["median"] == pytest.approx(0.5)
    assert row["parts"]["128"]["token"]["parts"]["experts"] == 0.12 and row["timing_costs"]["128"] == [2.0, 1.25]
    assert row["resident"] == 5 * GIB and row["proportional"] == 3 * GIB and row["loaded"]["lora_per_token"] == 0


def test_stock_that_is_on_a_gpu_whole():
    """Its weights take none of the CPU's memory, so nothing is over them."""
    report = made_up()
    stock = report.rows[1]
    stock.loaded = replace(stock.loaded, weights=0, experts_per_token=0, others_per_token=0, resident=GIB)
    stock.gpu_memory = 14 * GIB
    out = io.StringIO()
    show(report, Console(file=out, width=160))
    text = " ".join(out.getvalue().split())
    for part in ("memory │ 1 │ - │", "GPU memory │ 1 │ 2.00 │", "GPU memory │ 0.50 │ 1 │", "over weights │ 1.50 │ - │"):
        assert part in text, (part, text)
    assert json.loads(json.dumps(report.to_dict()))["rows"][1]["memory_over_weights"] is None
