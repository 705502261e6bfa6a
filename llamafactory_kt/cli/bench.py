"""``llamafactory-kt bench``: how fast something answers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from ..bench.endpoint import Level
    from ..bench.engine import Measured

PROMPT = "Explain in a few sentences what a mixture-of-experts language model is."
_ENDPOINT, _CONFIG = "Endpoint", "Configuration"


def bench(
    config: Path = typer.Argument(
        None, help="LLaMA-Factory configuration for chatting, to measure on this machine.", show_default=False
    ),
    against: list[str] = typer.Option(
        None,
        help="Also measure it without the adapter (base), by stock transformers (stock), or with key=value; repeatable.",
        show_default=False,
        rich_help_panel=_CONFIG,
    ),
    prompt_tokens: str = typer.Option("128", help="Lengths of prompts, with commas.", rich_help_panel=_CONFIG),
    new_tokens: int = typer.Option(32, min=1, help="Tokens generated after each.", rich_help_panel=_CONFIG),
    rounds: int = typer.Option(5, min=1, help="Rounds; in each, all are measured in turn.", rich_help_panel=_CONFIG),
    endpoint: str = typer.Option(
        None,
        metavar="URL",
        help="OpenAI-compatible server, for example http://127.0.0.1:8000.",
        show_default=False,
        rich_help_panel=_ENDPOINT,
    ),
    model: str = typer.Option(
        None, help="Model name to send; default: the first it lists.", show_default=False, rich_help_panel=_ENDPOINT
    ),
    api_key: str = typer.Option(
        None, envvar="OPENAI_API_KEY", help="Bearer token.", show_default=False, rich_help_panel=_ENDPOINT
    ),
    concurrency: str = typer.Option(
        "1", help="Requests at once; several levels with commas: 1,4,16.", rich_help_panel=_ENDPOINT
    ),
    requests: int = typer.Option(10, min=1, help="Requests at each level.", rich_help_panel=_ENDPOINT),
    warm_up: int = typer.Option(3, min=0, help="Requests before, not counted.", rich_help_panel=_ENDPOINT),
    max_tokens: int = typer.Option(128, min=1, help="Tokens of an answer, at most.", rich_help_panel=_ENDPOINT),
    prompt: str = typer.Option(PROMPT, help="What to ask; a number is put before it.", rich_help_panel=_ENDPOINT),
    as_json: bool = typer.Option(False, "--json", help="Print JSON (seconds, tokens a second)."),
) -> None:
    """Measure a configuration on this machine, or an endpoint: time to the first token, tokens a second, memory."""
    import json

    if (config is None) == (endpoint is None):
        raise typer.BadParameter("give a configuration, or the server's URL with --endpoint")
    if config is not None:
        found = _measure(config, against or [], _levels(prompt_tokens, "--prompt-tokens"), new_tokens, rounds)
        if as_json:
            typer.echo(json.dumps([one.to_dict() for one in found], indent=2))
        else:
            _show_engines(found)
        return
    import asyncio

    from tqdm import tqdm

    from ..bench.endpoint import Endpoint

    levels = _levels(concurrency, "--concurrency")
    server = Endpoint(endpoint, model, api_key)
    with tqdm(total=warm_up + requests * len(levels), unit="request", delay=1.0) as bar:
        reached = asyncio.run(server.measure(prompt, max_tokens, requests, warm_up, levels, bar.update))
    if as_json:
        typer.echo(
            json.dumps(
                {"endpoint": server.url, "model": server.model, "levels": [x.to_dict() for x in reached]}, indent=2
            )
        )
    else:
        _show(server.url, server.model or "", reached)
    if any(level.failed for level in reached):
        raise typer.Exit(1)


def _measure(path: Path, against: list[str], lengths: list[int], new_tokens: int, rounds: int) -> list[Measured]:
    from tqdm import tqdm

    from ..bench.engine import bench as measure
    from ..bench.engine import variants
    from ..hooks.configuration import read_yaml

    configs = variants(read_yaml(path), against)
    with tqdm(total=len(configs) * (1 + rounds * len(lengths)), delay=1.0, desc="Measuring") as bar:
        return measure(configs, lengths, new_tokens, rounds, bar.update)


def _show_engines(found: list[Measured]) -> None:
    from statistics import median

    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from ..bench.engine import ratio
    from ..machine import gib

    first, table = found[0], Table("", "load", "peak memory", title="Speed on this machine", title_justify="left")
    for length in first.prefill:
        for text in (f"prompt {length}", "ratio", "token/s", "ratio"):
            table.add_column(text)
    for one in found:
        row = [
            escape(one.name),
            f"{one.load:.1f} s",
            gib(one.memory) + (f" + {gib(one.gpu_memory)}" if one.gpu_memory else ""),
        ]
        for length, times in one.prefill.items():
            decode = one.decode[length]
            row += [f"{1000 * median(times):.0f} ms", f"{ratio(times, first.prefill[length]):.2f}"]
            low, high = 1 / max(decode), 1 / min(decode)
            row += [f"{1 / median(decode):.1f} ({low:.1f}-{high:.1f})", f"{ratio(decode, first.decode[length]):.2f}"]
        table.add_row(*row)
    console = Console()
    console.print(table)
    console.print(
        "Ratios are speeds against the first row's of the same round, medians over rounds: above 1 is faster."
    )


def _levels(text: str, option: str) -> list[int]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise typer.BadParameter(f"whole numbers above 0 with commas, found {text!r}", param_hint=option)
    return [int(part) for part in parts]


def _show(url: str, model: str, levels: list[Level]) -> None:
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table(
        "at once", "asked", "mean", "p50", "p90", "p99", "first", "first p90", "tok/s", "all tok/s",
        title=escape(f"{model} at {url}"), title_justify="left", caption_justify="left",
        caption="Latency and time to the first token in ms; tokens a second of one answer, and of all together.",
    )  # fmt: skip
    for level in levels:
        seconds = (level.mean, level.p50, level.p90, level.p99, level.first_token_mean, level.first_token_p90)
        asked = f"{level.requests}" + (f" ({level.failed} failed)" if level.failed else "")
        table.add_row(
            str(level.concurrency), asked, *(f"{value * 1000:.1f}" for value in seconds),
            f"{level.per_request_rate:.1f}", f"{level.total_rate:.1f}",
        )  # fmt: skip
    console = Console()
    console.print(table)
    if not all(level.counted for level in levels):
        console.print("The endpoint does not say how many tokens it made: pieces of its stream were counted instead.")
    for level in levels:
        if level.first_error:
            console.print(
                f"At {level.concurrency} at once, {level.failed} failed, the first: {level.first_error}", markup=False
            )
