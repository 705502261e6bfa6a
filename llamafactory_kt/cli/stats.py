"""``llamafactory-kt stats``: which experts a set of prompts uses."""

from __future__ import annotations

from pathlib import Path

import typer


def stats(
    config: Path = typer.Argument(..., help="LLaMA-Factory inference YAML with use_kt: true."),
    overrides: list[str] = typer.Argument(None, help="key=value, in place of the YAML's values.", show_default=False),
    prompts: Path = typer.Option(..., help="Prompts, .jsonl or .json: alpaca, sharegpt or openai form."),
    output: Path = typer.Option(..., help="Directory to write; must not exist or be empty."),
    split_by: str = typer.Option(None, help="Field of the prompts (language, domain) to count by.", show_default=False),
    batch_size: int = typer.Option(8, help="Prompts computed together."),
) -> None:
    """Count what the routers choose over a set of prompts and their answers: JSON, CSV, heat maps, SGLang's placement."""
    from tqdm import tqdm

    from ..ground.atomic_output import check_free
    from ..integration.chat_config import read_yaml
    from ..integration.prompts import read_prompts
    from ..router_stats.stats import router_table
    from ..tools.experiments.usage import count_usage, write_usage

    keys, rows = read_yaml(config, overrides or []), read_prompts(prompts)
    check_free(output)
    with tqdm(total=len(rows), unit="prompt", desc="Counting") as bar:
        usage = count_usage(keys, rows, split_by, batch_size, bar.update)
    write_usage(usage, output, Path(str(keys.get("model_name_or_path", config))).name)
    typer.echo(router_table(usage.total))
    for layer in usage.norms:
        correlation = usage.correlation(layer)
        known = (
            "no correlation (one of the two is constant)" if correlation is None else f"correlation {correlation:.2f}"
        )
        typer.echo(f"layer {layer}: {known} between an expert's tokens and its ‖ΔW‖")
    for answer in usage.failed:
        typer.echo(f"prompt {answer.index}: {answer.error}", err=True)
    typer.echo(f"Wrote {output}: {usage.prompts - len(usage.failed)} of {usage.prompts} prompts counted.")
    if usage.failed:
        raise typer.Exit(1)
