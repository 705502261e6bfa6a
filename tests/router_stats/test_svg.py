"""The heat map of a page: one picture, which stays small."""

from __future__ import annotations

import base64
import io
import re

import numpy as np
from PIL import Image

from llamafactory_kt.router_stats.stats import LayerStats, counted_since
from llamafactory_kt.router_stats.svg import COLORS, heat_map_html

TEXTS = {"axes": "axes", "point": "point", "cell": "{layer} {expert} {tokens} {balance}", "scale": "scale"}


def some_stats(layers: int, experts: int) -> dict[int, LayerStats]:
    random = np.random.default_rng(0)
    counts = random.integers(0, 5000, (layers, 2, experts))
    return {n + 1: LayerStats(n + 1, 900, 600, *counts[n], *counts[n] / 8) for n in range(layers)}


def test_large_models():
    stats = some_stats(48, 128)
    page = heat_map_html(stats, TEXTS)
    assert len(page) < 64 * 1024
    picture = base64.b64decode(re.search(r"base64,([^\"]+)", page)[1])
    cells = np.asarray(Image.open(io.BytesIO(picture)))
    balance = np.stack([entry.balance for entry in stats.values()])
    np.testing.assert_allclose(cells, balance / balance.max() * (COLORS - 1), atol=1)
    assert cells.shape == (48, 128)
    assert f'data-counts="{stats[1].counts[0]} ' in page


def test_counted_since():
    before, more = some_stats(2, 5), some_stats(2, 7)
    now = {layer: entry + entry for layer, entry in before.items()}
    assert [entry.to_dict() for entry in counted_since(before, now).values()] == [
        entry.to_dict() for entry in before.values()
    ]
    assert counted_since({}, more) == more
    reset = {1: LayerStats(1, 3, 3, *np.ones((4, 5), int))}
    assert counted_since(before, reset) == reset, "what is left after the counts were reset"
