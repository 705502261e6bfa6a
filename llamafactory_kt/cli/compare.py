"""``llamafactory-kt compare``: the same prompts through several configurations."""

from __future__ import annotations

import json
from pathlib import Path

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table


def compare(
    configs: list[Path] = typer.Argument(..., help="LLaMA-Factory inference YAMLs; the first is the reference."),
    prompts: Path = typer.Option(..., help="Prompts, .jsonl or .json: alpaca, sharegpt or openai form."),
    output: Path = typer.Option(..., help="Directory to write; must not exist or be empty."),
    ablate: bool = typer.Option(
        False, "--ablate", help="Take each adapter apart: off, attention part only, experts part only, on."
    ),
    set_: list[str] = typer.Option([], "--set", help="key=value for all configurations.", show_default=False),
    batch_size: int = typer.Option(8, help="Prompts computed together."),
    kl_tokens: int = typer.Option(64, help="Tokens of each answer along which distributions are compared."),
    seed: int = typer.Option(0, help="Seed of sampling."),
) -> None:
    """Compare answers, distributions, perplexity, speed and memory; writes report.html and comparison.json."""
    from ..ground.atomic_output import check_free, replacing
    from ..ground.errors import KTConfigError
    from ..integration.prompts import read_prompts
    from ..tools.experiments.comparing import compare as run
    from ..tools.experiments.measuring import Options
    from ..tools.experiments.plan import plan_variants
    from ..tools.experiments.report_html import shown_columns, write_report

    if batch_size < 1 or kl_tokens < 1:
        raise KTConfigError("--batch-size and --kl-tokens must be at least 1.")
    variants = plan_variants(configs, set_, ablate)
    rows = read_prompts(prompts)
    check_free(output)
    data = run(variants, rows, Options(batch_size, kl_tokens, seed))
    with replacing(output) as folder:
        folder.mkdir()
        text = json.dumps(data, ensure_ascii=False, indent=1, default=str)
        (folder / "comparison.json").write_text(text, encoding="utf-8")
        write_report(data, folder / "report.html")
    table = Table("", *(escape(variant["name"]) for variant in data["variants"]))
    for column in shown_columns(data):
        table.add_row(column.title, *map(column.show, data["variants"]))
    console = Console()
    console.print(table)
    for warning in data["warnings"]:
        console.print(f"Warning: {warning}", style="bold yellow", markup=False)
    typer.echo(f"Wrote {output / 'report.html'} and comparison.json.")
