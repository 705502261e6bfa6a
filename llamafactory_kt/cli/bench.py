"""``llamafactory-kt bench``: how fast something answers."""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from ..bench.endpoint import Level

PROMPT = "Explain in a few sentences what a mixture-of-experts language model is."
_ENDPOINT = "Endpoint"


def bench(
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
    """Measure latency, time to the first token and tokens a second of an endpoint, at one or several concurrencies."""
    import asyncio
    import json

    from tqdm import tqdm

    from ..bench.endpoint import Endpoint

    if endpoint is None:
        raise typer.BadParameter("give the server's URL", param_hint="--endpoint")
    levels = _levels(concurrency)
    server = Endpoint(endpoint, model, api_key)
    with tqdm(total=warm_up + requests * len(levels), unit="request", delay=1.0) as bar:
        found = asyncio.run(server.measure(prompt, max_tokens, requests, warm_up, levels, bar.update))
    if as_json:
        typer.echo(
            json.dumps(
                {"endpoint": server.url, "model": server.model, "levels": [x.to_dict() for x in found]}, indent=2
            )
        )
    else:
        _show(server.url, server.model or "", found)
    if any(level.failed for level in found):
        raise typer.Exit(1)


def _levels(text: str) -> list[int]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise typer.BadParameter(f"whole numbers above 0 with commas, found {text!r}", param_hint="--concurrency")
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
