"""The tables of a bench of configurations: ratios first, then the figures, then where the time goes."""

from __future__ import annotations

from statistics import median

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ...ground.machine import gib
from .results import OUTPUT, QUESTION, BenchReport, ConfigResult, SecondTurn, Speeds, Spread, ratio


def show(report: BenchReport, console: Console) -> None:
    """Print the ratios (if there is more than one row), the figures, and what puts them in doubt."""
    if len(report.rows) > 1:
        console.print(_ratios(report))
    console.print(_figures(report))
    if report.rows[0].parts:
        console.print(_parts(report))
    machine = report.machine
    speed, products = Spread.of(machine.bandwidth), Spread.of(machine.products)
    console.print(
        f"{machine.cpu}, {machine.cores} cores; reads {speed.show(1e-9)} GB/s of memory (torch's sum of 1 GiB of float32) and "
        f"multiplies with {products.show(1e-9, 0)} GFLOP/s (torch's product of large matrices) with {machine.cores} threads. "
        "Medians over rounds, in brackets the lowest and highest. Speeds above 1 are faster than the reference; "
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

    line("experts computed by", *(row.loaded.engine for row in rows))
    line("load", *(f"{median(row.loads):.1f} s" for row in rows))
    if report.machine.checkpoint:
        line("checkpoint read per core", *(f"{report.load_rate(row) / 1e9:.2f} GB/s" for row in rows))
    line("expert LoRA, a layer", *("-" if (p := row.loaded.push) is None else f"{1000 * p:.1f} ms" for row in rows))
    table.add_section()
    for length in rows[0].prefill:
        line(f"first token after {length}", *(f"{Spread.of(row.prefill[length]).show(1000, 0)} ms" for row in rows))
        line("  prefill token/s", *(Spread.of(length / time for time in row.prefill[length]).show() for row in rows))
        line("  of the CPU's peak", *(f"{report.peak_share(row, length).show(100, 0)} %" for row in rows))
        line("  decode token/s", *(Spread.of(1 / time for time in row.decode[length]).show() for row in rows))
        line("  ms a token", *(Spread.of(row.decode[length]).show(1000) for row in rows))
        line("  of the memory's bandwidth", *(f"{report.bandwidth_share(row, length).show(100, 0)} %" for row in rows))
        line("  bandwidth before / after, GB/s", *(_moments(row.speeds[length]) for row in rows))
        if any(row.turns for row in rows):
            line(f"  turn 2, {QUESTION} tokens more", *(_again(row.turns.get(length)) for row in rows))
        line("  read a token", *(gib(report.token_bytes(row, length)) for row in rows))
        table.add_section()
    line("expert weights a token", *(gib(row.loaded.experts_per_token) for row in rows))
    line("  reading them, at least", *(f"{1000 * report.floor(row).median:.1f} ms" for row in rows))
    line("LoRA a token", *(gib(row.loaded.lora_per_token) if row.loaded.lora_per_token else "-" for row in rows))
    line("resident, ready", *(gib(row.loaded.resident) for row in rows))
    line("  added by the model", *(gib(row.added) for row in rows))
    line("  weights", *(gib(row.loaded.weights) for row in rows))
    line("  added over weights", *("-" if (o := row.over_weights) is None else f"{o:.2f}" for row in rows))
    line("resident, all loaded", *(gib(row.resident) for row in rows))
    line("  shared pages divided (PSS)", *("-" if (p := row.proportional) is None else gib(p) for row in rows))
    line("peak while loading", *(gib(row.loaded.peak_loading) for row in rows))
    line("peak while answering", *(gib(row.peak) for row in rows))
    if any(row.gpu_memory for row in rows):
        line("peak on GPU", *(gib(row.gpu_memory) for row in rows))
    line("cores busy while waiting", *(f"{median(row.idle):.3f}" if row.idle else "-" for row in rows))
    return table


def _again(turns: list[SecondTurn] | None) -> str:
    if not turns:
        return "-"
    over = ratio(*zip(*turns, strict=True))
    return f"{Spread.of(turn.first_token for turn in turns).show(1000, 0)} ms, {over.show(digits=2)} of these alone"


def _moments(around: list[Speeds]) -> str:
    pairs = ((speeds.between.reads, speeds.after.reads) for speeds in around)
    return " / ".join(f"{median(reads) / 1e9:.1f}" for reads in zip(*pairs, strict=True))


def _parts(report: BenchReport) -> Table:
    table, rows = _table(report, "Time by part"), report.rows
    for length in rows[0].parts:
        found = [row.parts[length] for row in rows]
        prompt_costs, token_costs = zip(*(report.timing_costs(row, length) for row in rows), strict=True)
        table.add_row(f"[bold]a token after {length}[/]", *(f"{1000 * parts.token.total:.1f} ms" for parts in found))
        for part in found[0].token.parts:
            table.add_row(f"  {part}", *(_of_a_token(part, row, length) for row in rows))
        table.add_row(
            "  bandwidth before / after, GB/s", *(_moments([parts.speeds]) for parts in found if parts.speeds)
        )
        table.add_row("  timed by part / plain", *(f"{cost:.2f}" for cost in token_costs))
        table.add_row(f"[bold]a prompt of {length}[/]", *(f"{1000 * parts.prompt.total:.0f} ms" for parts in found))
        for part in found[0].prompt.parts:
            shares = (parts.prompt.parts[part] / parts.prompt.total for parts in found)
            table.add_row(f"  {part}", *(f"{100 * share:.1f} %" for share in shares))
        table.add_row("  timed by part / plain", *(f"{cost:.2f}" for cost in prompt_costs))
        table.add_section()
    return table


def _of_a_token(part: str, row: ConfigResult, length: int) -> str:
    """Milliseconds, and those a layer, of which the output layer is none."""
    time = 1000 * row.parts[length].token.parts[part]
    return f"{time:.1f} ms" if part == OUTPUT else f"{time:.1f} ms, {time / row.loaded.layers:.2f} a layer"
