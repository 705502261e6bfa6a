"""Tables and pictures of a model with 48 layers of 128 experts."""

from __future__ import annotations

import io

import numpy as np
import pytest

from llamafactory_kt.router_stats.plots import heat_map, save
from llamafactory_kt.router_stats.stats import LayerStats, router_table

LAYERS, EXPERTS = 48, 128


@pytest.fixture
def stats() -> dict[int, LayerStats]:
    """Random counts; layer 7 has one expert that gets nearly everything, and 3 that get nothing."""
    generator = np.random.default_rng(0)
    found = {}
    for layer in range(LAYERS):
        counts = generator.integers(50, 150, EXPERTS)
        if layer == 7:
            counts[:] = 10
            counts[5], counts[20:23] = 10_000, 0
        found[layer] = LayerStats(
            layer, int(counts.sum()) // 8, 900, counts // 2, counts - counts // 2, counts / 8, counts / 8
        )
    return found


def test_the_worst_layers_come_first(stats):
    summary, worst, *table = router_table(stats).splitlines()
    mean = (10 * (EXPERTS - 4) + 10_000) / EXPERTS
    assert (
        summary
        == f"48 layers: 3 of 6144 experts got no token; the busiest got {10_000 / mean:.1f} times the mean of its layer."
    )
    assert worst.startswith(f"Least even layers: 7 (expert 5 with {10_000 / mean:.1f} times the mean, 3 idle); ")
    assert len([line for line in table if line.startswith("│")]) == LAYERS


def test_a_small_model_needs_no_summary(stats):
    assert router_table({layer: stats[layer] for layer in range(3)}).lstrip().startswith("Experts: ")


def test_pictures_can_be_read(stats):
    """One expert does not make all others dark; circles stay in their cells; the picture is of a size that screens have."""
    rows = {layer: entry.balance.tolist() for layer, entry in stats.items()}
    figure = heat_map(rows, "title", rows, "marks", "label")
    axes = figure.axes[0]
    assert axes.images[0].get_clim()[1] < 3 < max(map(max, rows.values()))
    save(figure, io.BytesIO())
    cell = axes.get_window_extent().width / EXPERTS * 72 / figure.dpi
    assert max(axes.collections[0].get_sizes()) ** 0.5 < cell
    width, height = figure.get_size_inches() * 90
    assert width < 1500 and height < 1500
