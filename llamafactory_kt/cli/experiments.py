"""``llamafactory-kt generate``, ``compare`` and ``stats``: files of prompts through a model."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

import typer

from .output import JSON, OUTPUT, OVERRIDES, OVERWRITE, SEED, console, key_values, report

if TYPE_CHECKING:
    from ..tools.experiments.usage import ExpertUsage

_PROMPTS = typer.Option(..., "--prompts", "--input", help="Prompts, .jsonl or .json: alpaca, sharegpt or openai form.")
_BATCH_SIZE = typer.Option(8, min=1, help="Prompts computed together.")


def _keep_log_short() -> None:
    os.environ.setdefault("LLAMAFACTORY_VERBOSITY", "WARN")  # before LLaMA-Factory is imported


def generate(
    config: Path = typer.Argument(..., help="LLaMA-Factory inference YAML."),
    overrides: list[str] = OVERRIDES,
    prompts: Path = _PROMPTS,
    output: Path = typer.Option(..., help="Answers, .jsonl; answers of an earlier run are kept."),
    batch_size: int = _BATCH_SIZE,
    seed: int = SEED,
    overwrite: bool = typer.Option(False, "--overwrite", help="Answer all prompts again."),
    json_file: Path = JSON,
) -> None:
    """Answer prompts with the YAML's model, adapter, template and sampling keys; continues an interrupted run."""
    _keep_log_short()
    from tqdm import tqdm

    from ..ground.atomic_output import check_apart
    from ..integration.chat import LoadedChat
    from ..integration.chat_config import read_yaml
    from ..integration.prompts import read_prompts
    from ..tools.experiments.answers import AnswerFile
    from ..tools.experiments.generating import answer_all

    keys = read_yaml(config, overrides or [])
    check_apart(output, prompts, config)
    rows = read_prompts(prompts, keys.get("media_dir"))
    answers = AnswerFile(output, rows, {**keys, "seed": seed}, overwrite)
    kept = len(answers.lines)
    todo = [prompt for prompt in rows if prompt.index not in answers.lines]
    failed = tokens = 0
    if todo:
        chat = LoadedChat.load(keys)
        with tqdm(total=len(todo), unit="prompt", desc="Generating") as bar:
            for batch in answer_all(chat, todo, batch_size=batch_size, seed=seed):
                answers.add(batch)
                for answer in batch:
                    tokens += answer.answer_tokens
                    if answer.error:
                        failed += 1
                        bar.write(f"prompt {answer.index}: {answer.error}", file=sys.stderr)
                bar.update(len(batch))
                bar.set_postfix_str(f"{tokens / max(bar.format_dict['elapsed'], 1e-9):.1f} tokens/s", refresh=False)
    answers.sort()
    counts = {
        "prompts": len(rows),
        "answered": len(rows) - failed,
        "kept": kept,
        "failed": failed,
        "answer_tokens": tokens,
    }
    text = f"{output}: {len(rows) - failed} of {len(rows)} prompts answered ({kept} were there), {failed} failed."
    report(counts, json_file, lambda: typer.echo(text))
    if failed:
        raise typer.Exit(1)


def compare(
    words: list[str] = typer.Argument(
        ...,
        metavar="CONFIG... [KEY=VALUE]...",
        help="Configurations, of which the first is the reference, and keys for all of them.",
    ),
    prompts: Path = _PROMPTS,
    output: Path = OUTPUT,
    overwrite: bool = OVERWRITE,
    ablate: bool = typer.Option(
        False, "--ablate", help="Take each adapter apart: off, attention part only, experts part only, on."
    ),
    set_: list[str] = typer.Option(None, "--set", hidden=True, help="key=value, the earlier spelling."),
    batch_size: int = _BATCH_SIZE,
    kl_tokens: int = typer.Option(64, min=1, help="Tokens of each answer along which distributions are compared."),
    seed: int = typer.Option(0, min=0, max=2**32 - 1, help="Sampling seed."),
    json_file: Path = JSON,
) -> None:
    """Compare answers, distributions, perplexity, speed and memory; writes report.html, report.md and comparison.json."""
    _keep_log_short()
    from rich.markup import escape
    from rich.table import Table

    from ..ground.atomic_output import check_free, replacing
    from ..integration.prompts import read_prompts
    from ..tools.experiments.comparing import FILE, compare_variants
    from ..tools.experiments.measuring import CompareOptions
    from ..tools.experiments.plan import plan_variants
    from ..tools.experiments.report_html import markdown, shown_columns, write_report

    keys = [word for word in words if "=" in word and not Path(word).is_file()]
    configs = [Path(word) for word in words if word not in keys]
    if not configs:
        raise typer.BadParameter("give at least one configuration", param_hint="CONFIG")
    variants = plan_variants(configs, [*key_values(set_), *keys], ablate)
    rows = read_prompts(prompts, variants[0].config.get("media_dir"))
    earlier = FILE if overwrite else None
    check_free(output, earlier)
    data = compare_variants(variants, rows, CompareOptions(batch_size, kl_tokens, seed))
    with replacing(output, earlier) as folder:
        folder.mkdir()
        text = json.dumps(data, ensure_ascii=False, indent=1, default=str)
        (folder / FILE).write_text(text, encoding="utf-8")
        write_report(data, folder / "report.html")
        (folder / "report.md").write_text(markdown(data), encoding="utf-8")

    def show() -> None:
        table = Table("", *(escape(variant["name"]) for variant in data["variants"]))
        for column in shown_columns(data):
            table.add_row(column.title, *map(column.show, data["variants"]))
        out = console()
        out.print(table)
        for warning in data["warnings"]:
            out.print(f"Warning: {warning}", style="bold yellow", markup=False)
        typer.echo(f"Wrote {output / 'report.html'}, report.md and {FILE}.")

    report(json.loads(text), json_file, show)


def stats(
    config: Path = typer.Argument(..., help="LLaMA-Factory inference YAML with use_kt: true."),
    overrides: list[str] = OVERRIDES,
    prompts: Path = _PROMPTS,
    output: Path = OUTPUT,
    overwrite: bool = OVERWRITE,
    split_by: str = typer.Option(None, help="Field of the prompts (language, domain) to count by."),
    batch_size: int = _BATCH_SIZE,
    seed: int = SEED,
    json_file: Path = JSON,
) -> None:
    """Count what the routers choose over a set of prompts and their answers: JSON, CSV, heat maps, SGLang's placement."""
    _keep_log_short()
    from tqdm import tqdm

    from ..ground.atomic_output import check_free
    from ..integration.chat_config import read_yaml
    from ..integration.prompts import read_prompts
    from ..tools.experiments.usage import FILE, count_usage, write_usage

    keys = read_yaml(config, overrides or [])
    rows = read_prompts(prompts, keys.get("media_dir"))
    check_free(output, FILE if overwrite else None)
    with tqdm(total=len(rows), unit="prompt", desc="Counting", delay=1.0) as bar:
        usage = count_usage(keys, rows, split_by, batch_size, bar.update, seed=seed)
    write_usage(usage, output, Path(str(keys.get("model_name_or_path", config))).name, overwrite=overwrite)
    report(usage.to_dict(), json_file, lambda: _show_usage(usage, output))
    for answer in usage.failed:
        typer.echo(f"prompt {answer.index}: {answer.error}", err=True)
    if usage.failed:
        raise typer.Exit(1)


def _show_usage(usage: ExpertUsage, output: Path) -> None:
    from ..router_stats.stats import router_table

    typer.echo(router_table(usage.total))
    known = {layer: r for layer in usage.norms if (r := usage.correlation(layer)) is not None}
    if known:
        low, high = min(known, key=known.__getitem__), max(known, key=known.__getitem__)
        typer.echo(
            f"Correlation between an expert's tokens and its ‖ΔW‖: median {median(known.values()):.2f} of {len(known)} layers, from "
            f"{known[low]:.2f} (layer {low}) to {known[high]:.2f} (layer {high})."
        )
    elif usage.norms:
        typer.echo("No correlation between an expert's tokens and its ‖ΔW‖: in each layer, one of the two is constant.")
    typer.echo(f"Wrote {output}: {usage.prompts - len(usage.failed)} of {usage.prompts} prompts counted.")
