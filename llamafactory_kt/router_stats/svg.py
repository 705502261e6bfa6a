"""The heat map of router statistics for a web page: HTML that follows the page's colors, and tells the figures of a cell under the pointer.

The cells are one small picture, and their counts a list of numbers: an element for each cell would be a hundred times as large.
"""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Mapping

import numpy as np

from .stats import LayerStats

ROW = 14
"""pixels of a layer"""
WIDEST, NARROWEST = 28, 8
"""pixels of an expert"""
WIDTH = 720
"""pixels that few experts share"""
HEAD = 16
"""pixels of the experts' numbers"""
COLORS = 64

POINTER = """
() => {
    const tell = event => {
        const map = event.target.closest?.('.kt-heat-map'), picture = map?.querySelector('image')
        if (!picture) return
        const box = picture.getBoundingClientRect(), layers = map.dataset.layers.split(' ')
        const rows = map.dataset.counts.split(';')
        const row = Math.floor((event.clientY - box.top) / box.height * rows.length)
        if (row < 0 || row >= rows.length) return
        const counts = rows[row].split(' ').map(Number)
        const expert = Math.floor((event.clientX - box.left) / box.width * map.dataset.experts)
        if (!(expert in counts)) return
        const mean = counts.reduce((sum, count) => sum + count, 0) / counts.length
        const values = {layer: layers[row], expert, tokens: counts[expert], balance: (counts[expert] / (mean || 1)).toFixed(2)}
        map.parentElement.querySelector('.kt-cell').textContent = map.dataset.cell.replace(/{(\\w+)}/g, (_, name) => values[name])
    }
    document.addEventListener('pointermove', tell)
    document.addEventListener('pointerdown', tell)
}
"""
"""JavaScript that a page runs once: the cell under the pointer is named above the map"""


def heat_map_html(stats: Mapping[int, LayerStats], texts: Mapping[str, str]) -> str:
    """Layers x experts, each cell the expert's tokens relative to its layer's mean. Wider than the page, it scrolls below the layers' numbers.

    Args:
        stats: layer -> its statistics.
        texts: ``axes``, ``point`` (what to do to see a cell's figures), ``cell`` with ``{layer}``, ``{expert}``, ``{tokens}`` and
            ``{balance}``, and ``scale``, what stands before the colors.
    """
    experts = max(len(entry.counts) for entry in stats.values())
    side = max(NARROWEST, min(WIDEST, WIDTH // experts))
    width, height = side * experts, ROW * len(stats)
    most = max(float(entry.balance.max()) for entry in stats.values()) or 1.0
    step = next(step for step in (1, 2, 4, 8, 16, 32) if step * side >= 24)
    numbers = "".join(
        f'<text x="{(expert + 0.5) * side:g}" y="11">{expert}</text>' for expert in range(0, experts, step)
    )
    layers = "".join(f'<text x="26" y="{HEAD + place * ROW + 11}">{layer}</text>' for place, layer in enumerate(stats))
    counts = ";".join(" ".join(map(str, entry.counts.tolist())) for entry in stats.values())
    names = (
        f'data-layers="{" ".join(map(str, stats))}" data-experts="{experts}" data-cell="{html.escape(texts["cell"])}"'
    )
    text, scale = 'font-size="11" fill="currentColor"', ",".join(_hex(color) for color in _colors()[::9])
    return (
        f'<p class="kt-cell" style="font-size:12px;min-height:1.5em">{html.escape(texts["point"])}</p>'
        f'<div class="kt-heat-map" style="display:flex;max-height:90vh;overflow-y:auto" {names} data-counts="{counts}">'
        f'<svg width="32" height="{HEAD + height}" style="flex:none" {text} text-anchor="end">{layers}</svg>'
        f'<div style="overflow-x:auto"><svg width="{width + 8}" height="{HEAD + height}" {text} text-anchor="middle">{numbers}'
        f'<image y="{HEAD}" width="{width}" height="{height}" preserveAspectRatio="none" style="image-rendering:pixelated" '
        f'href="{_picture(stats, experts, most)}"/></svg></div></div>'
        f'<p style="font-size:12px;margin-top:6px">{html.escape(texts["axes"])} · {html.escape(texts["scale"])}0 <span style="display:'
        f'inline-block;width:120px;height:10px;background:linear-gradient(to right,{scale})"></span> {most:.1f}</p>'
    )


def _picture(stats: Mapping[int, LayerStats], experts: int, most: float) -> str:
    """A pixel for each cell, as the address of a PNG that holds it."""
    from PIL import Image

    cells = np.zeros((len(stats), experts), np.uint8)
    for row, entry in zip(cells, stats.values(), strict=True):
        row[: len(entry.counts)] = (COLORS - 1) * entry.balance / most
    image = Image.fromarray(cells)
    image.putpalette(_colors().tobytes())
    file = io.BytesIO()
    image.save(file, "PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def _colors() -> np.ndarray:
    """[C, 3] uint8: from no tokens to most."""
    from matplotlib import colormaps

    steps: np.ndarray = colormaps["viridis"](np.linspace(0, 1, COLORS), bytes=True)[:, :3]
    return np.ascontiguousarray(steps)


def _hex(color: np.ndarray) -> str:
    return f"#{bytes(color).hex()}"
