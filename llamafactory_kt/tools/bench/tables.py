"""The tables of a bench of configurations: ratios first, then the figures."""

from __future__ import annotations

from statistics import median

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ...ground.machine import gib
from .results import BenchReport, Spread


def show(report: BenchReport, console: Console) -> None:
    """Print the ratios (if there is more than one row), the figures, and what puts them in doubt."""
    if len(report.rows) > 1:
        console.print(_ratios(report))
    console.print(_figures(report))
    machine = report.machine
    speed = Spread.of(machine.bandwidth)
    console.print(
        f"{machine.cpu}, {machine.cores} cores; reads {speed.median / 1e9:.1f} GB/s "
        f"({speed.low / 1e9:.1f}-{speed.high / 1e9:.1f}) of memory with {machine.cores} threads (torch's sum of 1 GiB of "
        "float32). Medians over rounds, in brackets the lowest and highest. Speeds above 1 are faster than the reference; "
        "memory is what the model added to the process.",
        highlight=False,
    )
    for row in report.rows:
        if row.restless:
            console.print(
                f"[bold red]{escape(row.name)} kept {median(row.idle):.2f} cores busy while others were measured: all "
                "figures suffer.[/] Does OMP_WAIT_POLICY=ACTIVE make its threads spin?"
            )


def _table(report: BenchReport, title: str) -> Table:
    return Table("", *(escape(row.name) for row in report.rows), title=title, title_justify="left")


def _ratios(report: BenchReport) -> Table:
    table = _table(report, "Ratios of the same round")
    for reference in report.references:
        table.add_row(f"[bold]against {escape(reference.name)}[/]", *[""] * len(report.rows))
        columns = [report.ratios(row, reference) for row in report.rows]
        for title in dict.fromkeys(title for column in columns for title in column):
            cells = [
                "1" if row is reference else column[title].show(digits=2) if title in column else "-"
                for row, column in zip(report.rows, columns, strict=True)
            ]
            table.add_row(title, *cells)
        table.add_section()
    return table


def _figures(report: BenchReport) -> Table:
    rows = report.rows
    table = _table(report, "Figures")

    def line(title: str, *cells: str) -> None:
        table.add_row(title, *map(escape, cells))

    def shares(length: int, *, others: bool) -> list[str]:
        medians = (report.bandwidth_share(row, length, others=others).median for row in rows)
        return [f"{100 * share:.0f} %" for share in medians]

    line("experts computed by", *(row.loaded.engine for row in rows))
    line("load", *(f"{median(row.loads):.1f} s" for row in rows))
    if report.machine.checkpoint:
        line("checkpoint read per core", *(f"{report.load_rate(row) / 1e9:.2f} GB/s" for row in rows))
    line("expert LoRA, a layer", *("-" if (p := row.loaded.push) is None else f"{1000 * p:.1f} ms" for row in rows))
    table.add_section()
    for length in rows[0].prefill:
        line(f"first token after {length}", *(f"{Spread.of(row.prefill[length]).show(1000, 0)} ms" for row in rows))
        line("  prefill token/s", *(Spread.of(length / time for time in row.prefill[length]).show() for row in rows))
        line("  decode token/s", *(Spread.of(1 / time for time in row.decode[length]).show() for row in rows))
        line("  ms a token", *(Spread.of(row.decode[length]).show(1000) for row in rows))
        line("  of it, reading experts", *shares(length, others=False))
        line("  of it, reading weights", *shares(length, others=True))
        table.add_section()
    line("expert weights a token", *(gib(row.loaded.experts_per_token) for row in rows))
    line("  reading them, at least", *(f"{1000 * report.floor(row).median:.1f} ms" for row in rows))
    line("resident, ready", *(gib(row.loaded.resident) for row in rows))
    line("  added by the model", *(gib(row.added) for row in rows))
    line("  weights", *(gib(row.loaded.weights) for row in rows))
    line("  added over weights", *("-" if (o := row.over_weights) is None else f"{o:.2f}" for row in rows))
    line("peak while loading", *(gib(row.loaded.peak_loading) for row in rows))
    line("peak while answering", *(gib(row.peak) for row in rows))
    if any(row.gpu_memory for row in rows):
        line("peak on GPU", *(gib(row.gpu_memory) for row in rows))
    line("cores busy while waiting", *(f"{median(row.idle):.3f}" if row.idle else "-" for row in rows))
    return table
