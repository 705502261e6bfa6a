"""``llamafactory-kt bench``: how fast something answers."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from ..tools.bench.endpoint import Latency
    from ..tools.bench.figures import Report
    from ..tools.bench.room import Weights
    from ..tools.bench.rows import Row

PROMPT = "Explain in a few sentences what a mixture-of-experts language model is."
_ENDPOINT, _CONFIG = "Endpoint", "Configuration"


def bench(
    words: list[str] = typer.Argument(
        None,
        metavar="[CONFIG] [KEY=VALUE]...",
        help="LLaMA-Factory configuration for chatting, to measure on this machine, and keys that replace its own.",
        show_default=False,
    ),
    synthetic: str = typer.Option(
        None,
        metavar="NAME[:LAYERS]",
        help="Instead of a configuration: a random model of real layer sizes with a random adapter, made in the cache "
        "directory: deepseek-v2-lite, deepseek-v3, mixtral-8x7b, qwen3-30b-a3b.",
        show_default=False,
        rich_help_panel=_CONFIG,
    ),
    against: list[str] = typer.Option(
        None,
        help="Also measure stock transformers with the adapter merged (stock), or the same with key=value; repeatable.",
        show_default=False,
        rich_help_panel=_CONFIG,
    ),
    base: bool = typer.Option(True, help="Also measure it without its adapter.", rich_help_panel=_CONFIG),
    prompt_tokens: str = typer.Option("128", help="Lengths of prompts, with commas.", rich_help_panel=_CONFIG),
    new_tokens: int = typer.Option(64, min=1, help="Tokens generated after each.", rich_help_panel=_CONFIG),
    rounds: int = typer.Option(5, min=1, help="Rounds; in each, all are measured in turn.", rich_help_panel=_CONFIG),
    loads: int = typer.Option(1, min=1, help="Times that each is loaded, in turn.", rich_help_panel=_CONFIG),
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
    requests: int = typer.Option(10, min=1, help="Requests, one after the other.", rich_help_panel=_ENDPOINT),
    warm_up: int = typer.Option(3, min=0, help="Requests before, not counted.", rich_help_panel=_ENDPOINT),
    max_tokens: int = typer.Option(128, min=1, help="Tokens of an answer, at most.", rich_help_panel=_ENDPOINT),
    prompt: str = typer.Option(PROMPT, help="What to ask; a number is put before it.", rich_help_panel=_ENDPOINT),
    json_file: Path = typer.Option(
        None,
        "--json",
        metavar="FILE",
        dir_okay=False,
        help="Write all figures as JSON (seconds, bytes, tokens a second) to a file, or to standard output (-).",
        show_default=False,
    ),
) -> None:
    """Measure a configuration on this machine, or an endpoint: time to the first token, tokens a second, memory."""
    if sum((synthetic is not None, bool(words) and synthetic is None, endpoint is not None)) != 1:
        raise typer.BadParameter("give a configuration, or --synthetic, or the server's URL with --endpoint")
    if endpoint is None:
        lengths = _lengths(prompt_tokens)
        found = _measure(words or [], synthetic, against or [], base, lengths, new_tokens, rounds, loads)
        _write(json_file, found.to_dict())
        if str(json_file) != "-":
            from rich.console import Console

            from ..tools.bench.tables import show

            show(found, Console())
        return
    from ..tools.bench.endpoint import measure

    latency = measure(endpoint, model, api_key, prompt, max_tokens, requests, warm_up)
    _write(json_file, asdict(latency))
    if str(json_file) != "-":
        _show(latency)


def _measure(
    words: list[str], synthetic: str | None, against: list[str], base: bool, lengths: list[int], new_tokens: int,
    rounds: int, loads: int,
) -> Report:  # fmt: skip
    from tqdm import tqdm

    from ..integration.chat_config import read_yaml
    from ..tools.bench.room import warm_page_cache
    from ..tools.bench.rounds import bench as measure
    from ..tools.bench.rows import rows

    if synthetic is not None:
        chosen = _make(synthetic, words, against, base)
    else:
        chosen = rows(read_yaml(words[0], words[1:]), against, base=base)
        _check_room(chosen)
    checkpoint = warm_page_cache(str(chosen[0].config.get("model_name_or_path")))
    with tqdm(total=len(chosen) * (loads + rounds * len(lengths)), delay=1.0, desc="Measuring") as bar:
        return measure(chosen, lengths, new_tokens, rounds, loads=loads, checkpoint=checkpoint, tick=bar.update)


def _make(synthetic: str, words: list[str], against: list[str], base: bool) -> list[Row]:
    """Make the synthetic model, if it is not there yet, and say what it takes."""
    from ..ground.machine import gib
    from ..tools.bench.rows import overrides, rows
    from ..tools.bench.shapes import parse_shape
    from ..tools.bench.synthetic import Synthetic

    made = Synthetic.of(parse_shape(synthetic))
    chosen = rows({**made.values, **overrides(words)}, against, base=base)
    needs = _check_room(chosen, made.weights)
    each = ", ".join(f"{name} {gib(size)}" for name, size in needs.items())
    typer.echo(f"{made.directory}: {gib(made.weights.total)} on disk; in memory: {each}.", err=True)
    typer.echo(f"Its configuration: {made.build()}", err=True)
    return chosen


def _check_room(chosen: list[Row], weights: Weights | None = None) -> dict[str, int]:
    import torch

    from ..tools.bench.room import check_room, stored_weights

    weights = weights or stored_weights(str(chosen[0].config.get("model_name_or_path")))
    gpus = range(torch.cuda.device_count())
    gpu_memory = sum(torch.cuda.get_device_properties(number).total_memory for number in gpus)
    return check_room(chosen, weights, gpu_memory) if weights else {}


def _write(path: Path | None, content: dict[str, Any]) -> None:
    import json

    if path is None:
        return
    text = json.dumps(content, indent=2, ensure_ascii=False)
    if str(path) == "-":
        typer.echo(text)
    else:
        path.write_text(text + "\n", encoding="utf-8")


def _lengths(text: str) -> list[int]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise typer.BadParameter(f"whole numbers above 0 with commas, found {text!r}", param_hint="--prompt-tokens")
    return [int(part) for part in parts]


def _show(found: Latency) -> None:
    def ms(seconds: float) -> str:
        return f"{1000 * seconds:.1f} ms"

    typer.echo(f"{found.model} at {found.endpoint}, {found.requests} requests one after the other")
    typer.echo(f"latency: mean {ms(found.mean)}, p50 {ms(found.p50)}, p90 {ms(found.p90)}, p99 {ms(found.p99)}")
    typer.echo(f"first token: mean {ms(found.first_token_mean)}")
    if found.per_request_rate is not None:
        pieces = "" if found.counted else " (pieces of the stream; the endpoint does not say how many tokens it made)"
        typer.echo(f"tokens/s after the first: mean {found.per_request_rate:.1f}{pieces}")
