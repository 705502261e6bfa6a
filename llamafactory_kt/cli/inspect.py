"""``llamafactory-kt inspect``: what is in an adapter, and does it fit a model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ..ground.errors import KTError, name_some
from ..ground.machine import gib

if TYPE_CHECKING:
    from ..adapters.inspection import Inspection


def inspect(
    path: Path = typer.Argument(..., help="Adapter directory."),
    model: str = typer.Option(
        None, help="Also check whether the adapter fits this model (its config.json).", show_default=False
    ),
    values: bool = typer.Option(
        False, "--values", help="Read the tensors too: NaN and Inf, and how much each expert changed."
    ),
    heatmap: Path = typer.Option(
        None, help="Draw ‖ΔW‖ as layers x experts into this PNG (reads the values).", show_default=False
    ),
    as_json: bool = typer.Option(False, "--json", help="Print JSON."),
    verbose: bool = typer.Option(False, "-v", "--verbose", help="Name every tensor with NaN or Inf."),
) -> None:
    """Show an adapter's format, ranks, tensors and layers; reads headers only, unless values are asked for."""
    from ..adapters import open_adapter
    from ..adapters.inspection import inspect_adapter

    adapter = open_adapter(path)
    fits: str | None = None
    shapes = None
    if model is not None:
        shapes, fits = _check_model(model, adapter)
    result = inspect_adapter(adapter, values=values or heatmap is not None, shapes=None if fits else shapes)
    if heatmap is not None:
        _draw(result, heatmap)
    if as_json:
        content = {**result.to_dict(), **({"fits": not fits, "problem": fits or None} if model is not None else {})}
        typer.echo(json.dumps(content, ensure_ascii=False, indent=2))
    else:
        _show(result, model, fits, verbose)
    bad = any(group.not_finite for group in result.groups.values())
    if bad or fits:
        raise typer.Exit(1)


def _check_model(name: str, adapter: Any) -> tuple[Any, str]:
    """(the model's experts per layer, why the adapter does not fit or ``""``)."""
    from ..adapters import AdapterSet
    from ..checkpoint.opening import MoEModel, empty_model

    moe = MoEModel(empty_model(name, quantised=True))
    try:
        moe.fit(AdapterSet((adapter,)))
    except KTError as error:
        return moe.shapes, str(error)
    return moe.shapes, ""


def _show(result: Inspection, model: str | None, fits: str | None, verbose: bool) -> None:
    console = Console()
    facts = Table(show_header=False)
    facts.add_row("Adapter", escape(result.path))
    facts.add_row("Format", result.format)
    facts.add_row("Base model", escape(result.base or "not recorded"))
    facts.add_row("r / lora_alpha", f"{result.r} / {result.lora_alpha:g}{' (rsLoRA)' if result.use_rslora else ''}")
    facts.add_row("Tensors", f"{result.tensors}, {gib(result.nbytes)}")
    layers = [f"{layer} ({experts})" for layer, experts in result.layers.items()]
    facts.add_row(
        "Layers (experts)",
        name_some(layers, 8)
        if layers
        else "no expert LoRA"
        if "routed experts" not in result.groups
        else "unknown without a model",
    )
    if model is not None:
        facts.add_row(escape(f"Fits {model}"), escape(fits or "yes"))
    console.print(facts)
    groups = Table("group", "tensors", "size", "dtype", "r / alpha / scaling", "NaN or Inf")
    for kind, group in result.groups.items():
        finite = "not read" if group.not_finite is None else str(len(group.not_finite)) if group.not_finite else "none"
        groups.add_row(
            kind, str(group.tensors), gib(group.nbytes), ", ".join(group.dtypes), name_some(group.settings, 3), finite
        )
    console.print(groups)
    for group in result.groups.values():
        if group.not_finite:
            console.print(
                f"NaN or Inf: {name_some(group.not_finite, len(group.not_finite) if verbose else 3)}", markup=False
            )
    if result.norms:
        norms = Table("layer", "‖ΔW‖ mean", "min", "max", "most changed experts")
        for layer, row in result.norms.items():
            order = sorted(range(len(row)), key=lambda expert, row=row: -row[expert])  # type: ignore[misc]
            top = ", ".join(f"{expert} ({row[expert]:.3g})" for expert in order[:3])
            norms.add_row(str(layer), f"{sum(row) / len(row):.3g}", f"{min(row):.3g}", f"{max(row):.3g}", top)
        console.print(norms)


def _draw(result: Inspection, path: Path) -> None:
    if not result.norms:
        raise typer.BadParameter("there is no expert LoRA to draw, or its sizes are unknown without --model")
    from ..router_stats.plots import heat_map, save

    save(heat_map(result.norms, f"‖ΔW‖ of {Path(result.path).name}"), path)
