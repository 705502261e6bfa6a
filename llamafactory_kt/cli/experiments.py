"""``llamafactory-kt generate``, ``compare`` and ``stats``: files of prompts through a model."""

from __future__ import annotations

import json
from pathlib import Path

import typer

_OVERRIDES = typer.Argument(None, help="key=value, in place of the YAML's values.")
_PROMPTS = typer.Option(..., help="Prompts, .jsonl or .json: alpaca, sharegpt or openai form.")
_OUTPUT = typer.Option(..., help="Directory to write; must not exist or be empty.")
_BATCH_SIZE = typer.Option(8, min=1, help="Prompts computed together.")


def generate(
    config: Path = typer.Argument(..., help="LLaMA-Factory inference YAML."),
    overrides: list[str] = _OVERRIDES,
    input: Path = _PROMPTS,
    output: Path = typer.Option(..., help="Answers, .jsonl; answers of an earlier run are kept."),
    batch_size: int = _BATCH_SIZE,
    seed: int = typer.Option(None, help="Sampling seed."),
    overwrite: bool = typer.Option(False, "--overwrite", help="Answer all prompts again."),
) -> None:
    """Answer prompts with the YAML's model, adapter, template and sampling keys; continues an interrupted run."""
    from tqdm import tqdm

    from ..integration.chat import LoadedChat
    from ..integration.chat_config import read_yaml
    from ..integration.prompts import read_prompts
    from ..tools.experiments.answers import AnswerFile
    from ..tools.experiments.generating import answer_all

    keys = read_yaml(config, overrides or [])
    prompts = read_prompts(input, keys.get("media_dir"))
    answers = AnswerFile(output, prompts, {**keys, "seed": seed}, overwrite)
    kept = len(answers.lines)
    todo = [prompt for prompt in prompts if prompt.index not in answers.lines]
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
                        bar.write(f"prompt {answer.index}: {answer.error}")
                bar.update(len(batch))
                bar.set_postfix_str(f"{tokens / max(bar.format_dict['elapsed'], 1e-9):.1f} tokens/s", refresh=False)
        answers.sort()
    typer.echo(
        f"{output}: {len(prompts) - failed} of {len(prompts)} prompts answered ({kept} were there), {failed} failed."
    )
    if failed:
        raise typer.Exit(1)


def compare(
    configs: list[Path] = typer.Argument(..., help="LLaMA-Factory inference YAMLs; the first is the reference."),
    prompts: Path = _PROMPTS,
    output: Path = _OUTPUT,
    ablate: bool = typer.Option(
        False, "--ablate", help="Take each adapter apart: off, attention part only, experts part only, on."
    ),
    set_: list[str] = typer.Option(None, "--set", help="key=value for all configurations."),
    batch_size: int = _BATCH_SIZE,
    kl_tokens: int = typer.Option(64, min=1, help="Tokens of each answer along which distributions are compared."),
    seed: int = typer.Option(0, help="Sampling seed."),
) -> None:
    """Compare answers, distributions, perplexity, speed and memory; writes report.html and comparison.json."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from ..ground.atomic_output import check_free, replacing
    from ..integration.prompts import read_prompts
    from ..tools.experiments.comparing import compare_variants
    from ..tools.experiments.measuring import CompareOptions
    from ..tools.experiments.plan import plan_variants
    from ..tools.experiments.report_html import shown_columns, write_report

    variants = plan_variants(configs, set_ or [], ablate)
    rows = read_prompts(prompts, variants[0].config.get("media_dir"))
    check_free(output)
    data = compare_variants(variants, rows, CompareOptions(batch_size, kl_tokens, seed))
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


def stats(
    config: Path = typer.Argument(..., help="LLaMA-Factory inference YAML with use_kt: true."),
    overrides: list[str] = _OVERRIDES,
    prompts: Path = _PROMPTS,
    output: Path = _OUTPUT,
    split_by: str = typer.Option(None, help="Field of the prompts (language, domain) to count by."),
    batch_size: int = _BATCH_SIZE,
) -> None:
    """Count what the routers choose over a set of prompts and their answers: JSON, CSV, heat maps, SGLang's placement."""
    from tqdm import tqdm

    from ..ground.atomic_output import check_free
    from ..integration.chat_config import read_yaml
    from ..integration.prompts import read_prompts
    from ..router_stats.stats import router_table
    from ..tools.experiments.usage import count_usage, write_usage

    keys = read_yaml(config, overrides or [])
    rows = read_prompts(prompts, keys.get("media_dir"))
    check_free(output)
    with tqdm(total=len(rows), unit="prompt", desc="Counting") as bar:
        usage = count_usage(keys, rows, split_by, batch_size, bar.update)
    write_usage(usage, output, Path(str(keys.get("model_name_or_path", config))).name)
    typer.echo(router_table(usage.total))
    for layer in usage.norms:
        r = usage.correlation(layer)
        known = "no correlation (one of the two is constant)" if r is None else f"correlation {r:.2f}"
        typer.echo(f"layer {layer}: {known} between an expert's tokens and its ‖ΔW‖")
    for answer in usage.failed:
        typer.echo(f"prompt {answer.index}: {answer.error}", err=True)
    typer.echo(f"Wrote {output}: {usage.prompts - len(usage.failed)} of {usage.prompts} prompts counted.")
    if usage.failed:
        raise typer.Exit(1)
