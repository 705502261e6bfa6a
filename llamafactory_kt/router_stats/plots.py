"""Plots through matplotlib's object interface: no global state, so a web server's threads may draw."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

DPI = 90
_MANY = 1024
"""cells, from which on single experts are far from all others"""
_TOP = 99.5
"""percentile that has the brightest color then"""
_MARKED = 90
"""percentile of the second values from which on they are drawn then"""


def heat_map(
    rows: Mapping[int, Sequence[float]], title: str, marks: Mapping[int, Sequence[float]] | None = None,
    mark_label: str = "", label: str = "",
) -> Figure:  # fmt: skip
    """Draw layers x experts.

    Args:
        rows: layer -> value per expert; layers may have different numbers of experts.
        marks: layer -> second value per expert, drawn as circles of proportional area.
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
    many = grid.size > _MANY
    top = float(np.nanpercentile(grid, _TOP) if many else np.nanmax(grid)) or 1.0  # no counts yet
    image = axes.imshow(grid, aspect="auto", cmap="viridis", interpolation="nearest", vmin=0, vmax=top)
    axes.set(xlabel="expert", ylabel="layer", title=title)
    step = max(1, len(rows) // 32)
    axes.set_yticks(range(0, len(rows), step), [str(layer) for layer in list(rows)[::step]])
    axes.xaxis.get_major_locator().set_params(integer=True)  # type: ignore[call-arg]
    figure.colorbar(image, label=label, extend="max" if many else "neither")
    if marks:
        largest = max((max(row) for row in marks.values()), default=0.0) or 1.0
        least = float(np.percentile([value for row in marks.values() for value in row], _MARKED)) if many else 0.0
        points = [
            (expert, place, _area(figure, grid) * value / largest)
            for place, layer in enumerate(rows)
            for expert, value in enumerate(marks.get(layer, ()))
            if value and value >= least
        ]
        if points:
            mark_label += f" (the largest {100 - _MARKED} %)" if many else ""
            x, y, size = zip(*points, strict=True)
            axes.scatter(
                x,
                y,
                size,
                facecolors="none",
                edgecolors="red",
                linewidths=1.0 if many else 1.5,
                label=mark_label,
            )
            figure.legend(loc="outside lower left", frameon=False)
    return figure


def _area(figure: Figure, grid: NDArray[np.float64]) -> float:
    """Of the largest circle that stays in its cell, in square points; at most what a small map has."""
    rows, columns = grid.shape
    width, height = (72 * inches for inches in figure.get_size_inches())
    side: float = min(0.85 * width / columns, 0.8 * height / rows)
    return min(90.0, (0.8 * side) ** 2)


def bars(names: Sequence[str], values: Sequence[float], unit: str) -> Figure:
    """Horizontal bars, one per name."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 1.1 + 0.32 * len(names)), layout="constrained")
    axes = figure.add_subplot()
    axes.bar_label(axes.barh(range(len(names)), values), fmt="%.3g", padding=2)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.margins(x=0.15)
    axes.set_xlabel(unit)
    return figure


def save(figure: Figure, path: Path | io.BytesIO) -> None:
    """Write a PNG."""
    figure.savefig(path, dpi=DPI, format="png")


def data_uri(figure: Figure) -> str:
    """The PNG as a ``data:`` URI, for self-contained HTML."""
    buffer = io.BytesIO()
    save(figure, buffer)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def router_heat_map(stats: Mapping[int, Any], title: str, norms: Mapping[int, Sequence[float]] | None = None) -> Figure:
    """Draw each expert's tokens relative to its layer's mean, with ``‖ΔW‖`` as circles."""
    rows = {layer: entry.balance.tolist() for layer, entry in stats.items()}
    return heat_map(rows, title, norms, "area: ‖ΔW‖ of the adapter", "tokens / mean of the layer")
