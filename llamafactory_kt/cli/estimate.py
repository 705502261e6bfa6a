"""``llamafactory-kt estimate``: does a model fit here, and how fast will it be?"""

from __future__ import annotations

import contextlib
import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from ..ground.machine import gib
from .output import JSON, console, report

if TYPE_CHECKING:
    from rich.table import Table

    from ..tools.estimate.results import Estimate, Row


def estimate(
    model: str = typer.Argument(
        ..., help="A model's folder, its config.json alone, or its name on the hub, of which config.json is fetched."
    ),
    adapter: list[str] = typer.Option(None, help="Directory of a LoRA adapter that will be applied. Repeatable."),
    recalibrate: bool = typer.Option(False, "--recalibrate", help="Measure this machine again."),
    json_file: Path = JSON,
) -> None:
    """Say what a model will take of memory and disk, and how fast it will be on this machine, before its weights are downloaded."""
    logger = logging.getLogger("llamafactory_kt.tools.estimate")
    logger.addHandler(logging.StreamHandler(sys.stderr))
    logger.setLevel(logging.INFO)
    from ..tools.estimate import estimate as run

    with contextlib.redirect_stdout(sys.stderr):  # libraries say what they miss
        found = run(model, adapter or None, measure_again=recalibrate)
    report(found.to_dict(), json_file, lambda: _show(found))


def _show(found: Estimate) -> None:
    from ..tools.estimate.results import CONTEXTS

    model, out = found.model, console()

    def line(text: str) -> None:
        out.print(text, markup=False, highlight=False)

    line(
        f"{model.name}: {model.architecture}, {_count(model.parameters)} parameters; {model.expert_layers} of {model.layers} layers "
        f"have {model.experts} experts, of which a token takes {model.experts_per_token}."
    )
    line(
        f"On disk {'' if model.disk_is_measured else 'about '}{gib(model.disk)}, {f'stored as {model.stored}' if model.stored else 'not quantized'}."
    )
    if model.adapter is not None:
        line(f"With the adapter {model.adapter}.")
    machine = found.machine
    kernels = ", ".join(
        f"{speed.reads / 1e9:.0f} GB/s and {speed.products / 1e9:.0f} GFLOP/s with {bits} bits"
        for bits, speed in machine.kernels.items()
    )
    line(
        f"This machine: {machine.cpu}, {machine.cores} cores; memory {gib(found.memory)}, of which {gib(found.free)} are free; it reads "
        f"{machine.reads / 1e9:.0f} GB/s and multiplies with {machine.products / 1e9:.0f} GFLOP/s"
        f"{f'; its kernels, with weights of so many bits, do {kernels}' if kernels else ''}."
    )
    if machine.was_busy:
        line(
            "It was measured while other programs kept it busy; the speeds are too low. --recalibrate measures it again."
        )
    for on_gpu in (False, True):
        line("")
        line(
            _with_gpu(found)
            if on_gpu
            else f"On the CPU alone; tokens/s with {', '.join(map(str, CONTEXTS))} tokens before, and of a prompt:"
        )
        rows = [row for row in found.rows if row.on_gpu == on_gpu]
        table = _table(rows, on_gpu, narrow=False)
        fits = out.measure(table, options=out.options.update(width=1000)).maximum <= out.width
        out.print(table if fits else _table(rows, on_gpu, narrow=True))
        line(_advice(found, on_gpu))


def _with_gpu(found: Estimate) -> str:
    here = f"{gib(found.gpu_free)} are free on it" if found.gpu_free is not None else "there is none here"
    return f"With a GPU for everything but the routed experts ({here}); tokens/s of the CPU's part alone:"


def _table(rows: list[Row], on_gpu: bool, narrow: bool) -> Table:
    """One row for each choice; where there is little room, without the parts of the memory."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    from ..tools.estimate.results import CONTEXTS

    contexts = CONTEXTS[:1] if on_gpu else CONTEXTS[:: 2 if narrow else 1]
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    titles = ["kt_backend", *(() if on_gpu else ("kt_dense", "kt_cache"))]
    if not narrow:
        titles += ["experts", "dense", *(["LoRA"] if any(row.lora for row in rows) else []), "cache"]
    titles += [*(("on the CPU", "on the GPU") if on_gpu else ("in all",)), "fits"]
    titles += ["tokens/s"] if on_gpu else [f"at {tokens}" for tokens in contexts]
    for title in (*titles, "prompt"):
        table.add_column(title, justify="left" if title.startswith(("kt_", "fits")) else "right", no_wrap=True)
    for number, row in enumerate(rows):
        if number and not on_gpu and row.kt_backend != rows[number - 1].kt_backend:
            table.add_row()
        cells = [row.kt_backend, *(() if on_gpu else (row.kt_dense, row.kt_cache))]
        if not narrow:
            cells += [gib(row.experts), gib(row.dense), *([gib(row.lora)] if "LoRA" in titles else []), gib(row.cache)]
        cells += [gib(row.cpu), *([gib(row.gpu)] if on_gpu else []), "yes" if row.fits else "no"]
        cells += [_rate(row.tokens_per_second[tokens]) for tokens in contexts]
        table.add_row(*cells, _rate(row.prompt_tokens_per_second))
    return table


def _count(parameters: int) -> str:
    """
    >>> _count(30_532_122_624), _count(1_500_000)
    ('30.5 billion', '1.5 million')
    """
    return f"{parameters / 1e9:.1f} billion" if parameters >= 10**8 else f"{parameters / 1e6:.1f} million"


def _rate(speed: float) -> str:
    return f"{speed:.0f}" if speed >= 100 else f"{speed:.1f}" if speed >= 1 else f"{speed:.2f}"


def _advice(found: Estimate, on_gpu: bool) -> str:
    best = found.best(on_gpu)
    if best is not None:
        keys = [f"kt_backend: {best.kt_backend}"] + (
            [] if on_gpu else [f"kt_dense: {best.kt_dense}", f"kt_cache: {best.kt_cache}"]
        )
        return f"The fastest that fits: {', '.join(keys)}."
    least = min((row for row in found.rows if row.on_gpu == on_gpu), key=lambda row: row.cpu)
    needs = [f"{gib(least.cpu + least.loading)} of memory"] + ([f"{gib(least.gpu)} on the GPU"] if on_gpu else [])
    return f"Nothing fits; the least takes {' and '.join(needs)}."
