"""``llamafactory-kt inspect``: what is in an adapter, and does it fit a model."""

from __future__ import annotations

from math import isfinite
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import typer
from rich.markup import escape
from rich.table import Table

from ..ground.errors import KTError, name_some, ranges
from ..ground.machine import gib
from .output import JSON, console, report

if TYPE_CHECKING:
    from ..adapters.inspection import Inspection


def inspect(
    path: Path = typer.Argument(..., help="Adapter directory."),
    model: str = typer.Option(None, help="Also check whether the adapter fits this model (its config.json)."),
    values: bool = typer.Option(
        False, "--values", help="Read the tensors too: NaN and Inf, and how much each expert changed."
    ),
    heatmap: Path = typer.Option(None, help="Draw ‖ΔW‖ as layers x experts into this PNG (reads the values)."),
    json_file: Path = JSON,
    verbose: bool = typer.Option(False, "-v", "--verbose", help="Name every tensor with NaN or Inf."),
) -> None:
    """Show an adapter's format, ranks, tensors and layers; reads only headers, unless values are needed."""
    from ..adapters import open_adapter
    from ..adapters.inspection import inspect_adapter
    from ..ground.atomic_output import replacing

    if heatmap is not None and heatmap.suffix.lower() != ".png":
        raise typer.BadParameter(f"a name that ends in .png, found {heatmap}", param_hint="--heatmap")
    adapter = open_adapter(path)
    shapes, problem = _check_model(model, adapter) if model is not None else (None, "")
    result = inspect_adapter(adapter, values=values or heatmap is not None, shapes=None if problem else shapes)
    if heatmap is not None:
        from ..router_stats.plots import heat_map, save

        if not result.norms:
            raise typer.BadParameter("there is no expert LoRA to draw, or its sizes are unknown without --model")
        with replacing(heatmap) as file:
            save(heat_map(result.norms, f"‖ΔW‖ of {Path(result.path).name}"), file)
    fit = {"fits": not problem, "problem": problem or None} if model is not None else {}
    report({**result.to_dict(), **fit}, json_file, lambda: _show(result, model, problem, verbose))
    if problem or any(group.not_finite for group in result.groups.values()):
        raise typer.Exit(1)


def _check_model(name: str, adapter: Any) -> tuple[Any, str]:
    """(layer -> the model's experts' sizes, why the adapter does not fit or ``""``)."""
    from ..adapters import AdapterSet
    from ..checkpoint.opening import MoEModel, empty_model

    moe = MoEModel(empty_model(name, quantized=True))
    try:
        moe.fit(AdapterSet((adapter,)), resizes=True)
    except KTError as error:
        return moe.shapes, str(error)
    return moe.shapes, ""


def _show(result: Inspection, model: str | None, problem: str, verbose: bool) -> None:
    out = console()
    sizes: dict[int, list[int]] = {}
    for layer, experts in result.layers.items():
        sizes.setdefault(experts, []).append(layer)
    layers = "; ".join(f"{ranges(found)} ({experts} each)" for experts, found in sizes.items())
    none = "unknown without a model" if "routed experts" in result.groups else "no expert LoRA"
    facts = Table(show_header=False)
    facts.add_row("Adapter", escape(result.path))
    facts.add_row("Format", result.format)
    facts.add_row("Base model", escape(result.base or "not recorded"))
    facts.add_row("r / lora_alpha", f"{result.r} / {result.lora_alpha:g}{' (rsLoRA)' if result.use_rslora else ''}")
    facts.add_row("Tensors", f"{result.tensors}, {gib(result.nbytes)}")
    facts.add_row("Layers (experts)", layers or none)
    if model is not None:
        facts.add_row(escape(f"Fits {model}"), escape(problem or "yes"))
    out.print(facts)
    groups = Table("group", "tensors", "size", "dtype", "r / alpha / scaling", "NaN or Inf")
    for kind, group in result.groups.items():
        finite = "not read" if group.not_finite is None else str(len(group.not_finite) or "none")
        dtypes, settings = ", ".join(group.dtypes), name_some(group.settings, 3)
        groups.add_row(kind, str(group.tensors), gib(group.nbytes), dtypes, settings, finite)
    out.print(groups)
    for group in result.groups.values():
        if group.not_finite:
            names = name_some(group.not_finite, len(group.not_finite) if verbose else 3)
            out.print(f"NaN or Inf: {names}", markup=False)
    if result.norms:
        for line in _summary(result.norms):
            out.print(line, highlight=False)
        norms = Table("layer", "‖ΔW‖ mean", "min", "max", "most changed experts")
        for layer, row in result.norms.items():
            order = sorted(enumerate(row), key=lambda pair: -pair[1])
            top = ", ".join(f"{expert} ({norm:.3g})" for expert, norm in order[:3])
            norms.add_row(str(layer), f"{sum(row) / len(row):.3g}", f"{min(row):.3g}", f"{max(row):.3g}", top)
        out.print(norms)


def _summary(norms: dict[int, list[float]]) -> list[str]:
    """How much was changed in all, and where most; of what is finite."""
    known = {layer: {e: norm for e, norm in enumerate(row) if isfinite(norm)} for layer, row in norms.items()}
    every = sorted(
        ((norm, layer, expert) for layer, row in known.items() for expert, norm in row.items()), reverse=True
    )
    if not every:
        return []
    most = ", ".join(f"expert {expert} of layer {layer} ({norm:.3g})" for norm, layer, expert in every[:3])
    means = {layer: fmean(row.values()) for layer, row in known.items() if row}
    low, high = min(means, key=means.__getitem__), max(means, key=means.__getitem__)
    untouched = sum(norm == 0 for norm, _, _ in every)
    return [
        f"‖ΔW‖ of {len(every)} experts in {len(means)} layers: mean {fmean(norm for norm, _, _ in every):.3g}; {untouched} unchanged; most "
        f"changed: {most}.",
        f"Layers by their mean: least {low} ({means[low]:.3g}), most {high} ({means[high]:.3g}).",
    ]
