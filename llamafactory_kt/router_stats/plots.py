"""Pictures, through matplotlib's object interface: no global state, so threads of a web server may draw."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DPI = 90


def heat_map(
    rows: Mapping[int, Sequence[float]], title: str, marks: Mapping[int, Sequence[float]] | None = None,
    mark_label: str = "", label: str = "",
) -> Figure:  # fmt: skip
    """Layers x experts.

    Args:
        rows: layer -> value per expert; layers may have different numbers of experts.
        marks: a second value per expert, drawn as circles whose area follows it.
    """
    from matplotlib.figure import Figure

    width = max(len(row) for row in rows.values())
    grid = np.full((len(rows), width), np.nan)
    for place, row in enumerate(rows.values()):
        grid[place, : len(row)] = row
    figure = Figure(
        figsize=(min(16, max(6, 1.5 + 0.16 * width)), max(2.8, 1.6 + 0.25 * len(rows))), layout="constrained"
    )
    axes = figure.add_subplot()
    top = float(np.nanmax(grid)) or 1.0  # nothing was counted yet
    image = axes.imshow(grid, aspect="auto", cmap="viridis", interpolation="nearest", vmin=0, vmax=top)
    axes.set(xlabel="expert", ylabel="layer", title=title)
    step = max(1, len(rows) // 32)
    axes.set_yticks(range(0, len(rows), step), [str(layer) for layer in list(rows)[::step]])
    axes.xaxis.get_major_locator().set_params(integer=True)  # type: ignore[call-arg]
    figure.colorbar(image, label=label)
    if marks:
        largest = max((max(row) for row in marks.values()), default=0.0) or 1.0
        points = [
            (expert, place, 90 * value / largest)
            for place, layer in enumerate(rows)
            for expert, value in enumerate(marks.get(layer, ()))
            if value
        ]
        if points:
            x, y, size = zip(*points, strict=True)
            axes.scatter(x, y, size, facecolors="none", edgecolors="red", label=mark_label)
            axes.legend(loc="upper left", bbox_to_anchor=(0, -0.25), frameon=False)
    return figure


def bars(names: Sequence[str], values: Mapping[str, Sequence[float]], unit: str) -> Figure:
    """One group of horizontal bars a name, one bar a key of ``values``."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 1.1 + 0.32 * len(names) * max(1, len(values))), layout="constrained")
    axes = figure.add_subplot()
    height = 0.8 / len(values)
    for place, (label, row) in enumerate(values.items()):
        at = [number + (place - (len(values) - 1) / 2) * height for number in range(len(names))]
        drawn = axes.barh(at, row, height, label=label)
        axes.bar_label(drawn, fmt="%.3g", padding=2)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.margins(x=0.15)
    axes.set_xlabel(unit)
    if len(values) > 1:
        axes.legend(frameon=False)
    return figure


def save(figure: Figure, path: Path) -> None:
    """As PNG."""
    figure.savefig(path, dpi=DPI, format="png")


def data_uri(figure: Figure) -> str:
    """As a PNG inside an address, for a file of HTML that needs no other."""
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=DPI, format="png")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def router_heat_map(stats: Mapping[int, Any], title: str, norms: Mapping[int, Sequence[float]] | None = None) -> Figure:
    """Each expert's share of its layer's tokens, against an even share, with ``‖ΔW‖`` as circles."""
    rows = {layer: entry.balance.tolist() for layer, entry in stats.items()}
    return heat_map(rows, title, norms, "area: ‖ΔW‖ of the adapter", "tokens / mean of the layer")
