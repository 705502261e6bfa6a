"""The heat map of router statistics for a web page: HTML that follows the page's colors, and names each cell under the mouse."""

from __future__ import annotations

import html
from collections.abc import Mapping

from .stats import LayerStats

ROW = 14
"""pixels of a layer"""
WIDEST, NARROWEST = 28, 8
"""pixels of an expert"""
WIDTH = 720
"""pixels that few experts share"""
HEAD = 16
"""pixels of the experts' numbers"""


def heat_map_html(stats: Mapping[int, LayerStats], texts: Mapping[str, str]) -> str:
    """Layers x experts, each cell the expert's tokens relative to its layer's mean. Wider than the page, it scrolls below the layers' numbers.

    Args:
        stats: layer -> its statistics.
        texts: ``axes``, ``summary`` with ``{tokens}`` and ``{answers}``, ``cell`` with ``{layer}``, ``{expert}``, ``{tokens}``
            and ``{balance}``, and ``scale``, the name of the colors.
    """
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    colors = [to_hex(colormaps["viridis"](step / 63)) for step in range(64)]
    experts = max(len(entry.counts) for entry in stats.values())
    side = max(NARROWEST, min(WIDEST, WIDTH // experts))
    most = max(float(entry.balance.max()) for entry in stats.values()) or 1.0
    rows = []
    for place, (layer, entry) in enumerate(stats.items()):
        cells = "".join(
            f'<rect x="{expert * side}" width="{side}" height="{ROW}" fill="{colors[int(63 * balance / most)]}"><title>'
            f"{html.escape(texts['cell'].format(layer=layer, expert=expert, tokens=tokens, balance=balance))}</title></rect>"
            for expert, (tokens, balance) in enumerate(zip(entry.counts.tolist(), entry.balance.tolist(), strict=True))
        )
        rows.append(f'<g transform="translate(0,{HEAD + place * ROW})">{cells}</g>')
    step = next(step for step in (1, 2, 4, 8, 16, 32) if step * side >= 24)
    numbers = "".join(f'<text x="{expert * side}" y="11">{expert}</text>' for expert in range(0, experts, step))
    layers = "".join(
        f'<text x="26" y="{HEAD + place * ROW + 11}" text-anchor="end">{layer}</text>'
        for place, layer in enumerate(stats)
    )
    first = next(iter(stats.values()))
    summary = texts["summary"].format(tokens=first.tokens, answers=first.tokens - first.prompt_tokens)
    height, text = HEAD + ROW * len(stats), 'font-size="11" fill="currentColor"'
    return (
        f'<p>{html.escape(summary)}</p><div class="kt-heat-map" style="display:flex;max-height:90vh;overflow-y:auto">'
        f'<svg width="32" height="{height}" style="flex:none" {text}>{layers}</svg>'
        f'<div style="overflow-x:auto"><svg width="{side * experts + 8}" height="{height}" {text}>{numbers}{"".join(rows)}</svg></div></div>'
        f'<p style="font-size:12px">{html.escape(texts["axes"])} · {html.escape(texts["scale"])}: 0 <span style="display:inline-block;width:120px;'
        f'height:10px;background:linear-gradient(to right,{",".join(colors[::9])})"></span> {most:.1f}</p>'
    )
