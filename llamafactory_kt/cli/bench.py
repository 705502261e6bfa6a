"""``llamafactory-kt bench``: measure a configuration on this machine, or an endpoint."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from .output import JSON, console, key_values, one_of, report, usage_errors
from .quality import CHUNKS, CONTEXT, measured, quality_option, sorted_words

if TYPE_CHECKING:
    from ..tools.bench.configs import BenchConfig
    from ..tools.bench.endpoint import EndpointLatency
    from ..tools.bench.memory import CheckpointBytes

PROMPT = "Explain in a few sentences what a mixture-of-experts language model is."


def bench(
    words: list[str] = typer.Argument(
        None,
        metavar="[CONFIG] [KEY=VALUE]... [TEXT]",
        help="LLaMA-Factory configuration for a chat, and keys that override it; with --quality also a text.",
    ),
    synthetic: str = typer.Option(
        None,
        metavar="NAME[:LAYERS]",
        autocompletion=one_of(("deepseek-v2-lite", "deepseek-v3", "mixtral-8x7b", "qwen3-30b-a3b")),
        help="Instead of a configuration: a random model with real layer sizes and a random adapter, written to the "
        "cache directory: deepseek-v2-lite, deepseek-v3, mixtral-8x7b, qwen3-30b-a3b.",
    ),
    experts: int = typer.Option(
        None, metavar="N", help="With --synthetic: fewer routed experts a layer, so that more layers fit."
    ),
    against: list[str] = typer.Option(
        None,
        help="Also measure stock transformers with the adapter merged (stock), or this configuration with other values (KEY=VALUE, several in quotes). Repeatable.",
    ),
    base: bool = typer.Option(True, help="Also measure it without its adapter."),
    prompt_tokens: str = typer.Option("128", help="Lengths of prompts, with commas."),
    new_tokens: int = typer.Option(64, min=1, help="Tokens generated after each."),
    rounds: int = typer.Option(5, min=1, help="Rounds; in each, all are measured in turn."),
    parts: bool = typer.Option(True, help="Also time attention, linear layers and experts, once for each prompt."),
    loads: int = typer.Option(1, min=1, help="How often each is loaded, in turn."),
    quality: bool = quality_option("In place of speed: how far the next-token distributions are from float32's"),
    context: int = CONTEXT,
    chunks: int = CHUNKS,
    endpoint: str = typer.Option(
        None, metavar="URL", help="OpenAI-compatible server, for example http://127.0.0.1:8000."
    ),
    model: str = typer.Option(None, help="Model name to send; default: the first it lists."),
    api_key: str = typer.Option(None, envvar="OPENAI_API_KEY", help="Bearer token."),
    requests: int = typer.Option(10, min=1, help="Requests, one after the other."),
    warm_up: int = typer.Option(3, min=0, help="Requests before the measurement."),
    max_tokens: int = typer.Option(128, min=1, help="Maximum tokens per answer."),
    prompt: str = typer.Option(PROMPT, help="The prompt; a number is put before it."),
    seed: int = typer.Option(0, min=0, max=2**31 - 1, help="Of the random prompts, each of which uses other experts."),
    json_file: Path = JSON,
) -> None:
    """Measure a configuration's speed and memory, or what its precision costs, or an endpoint's latency."""
    if sum((synthetic is not None, bool(words) and synthetic is None, endpoint is not None)) != 1:
        raise typer.BadParameter("give a configuration, or --synthetic, or the server's URL with --endpoint")
    if quality and (synthetic is not None or endpoint is not None):
        raise typer.BadParameter("--quality needs a configuration with a trained model; random ones say nothing")
    if experts is not None and synthetic is None:
        raise typer.BadParameter("--experts goes with --synthetic alone")
    if endpoint is not None:
        from ..tools.bench.endpoint import measure_endpoint

        latency = measure_endpoint(endpoint, model, api_key, prompt, max_tokens, requests, warm_up)
        report(asdict(latency), json_file, lambda: _show_latency(latency))
        return
    if quality:
        from ..tools.bench.quality.table import show as show_quality

        config, text, keys = sorted_words(words)
        cost = measured(config, text, keys, against or [], context, chunks)
        report(cost.to_dict(), json_file, lambda: show_quality(cost, console()))
        return
    from tqdm import tqdm

    from ..tools.bench.memory import warm_page_cache
    from ..tools.bench.rounds import bench as measure
    from ..tools.bench.tables import show

    lengths = _lengths(prompt_tokens)
    configs = _configs(words or [], synthetic, experts, against or [], base)
    checkpoint = warm_page_cache(str(configs[0].config.get("model_name_or_path")))
    with tqdm(total=len(configs) * (loads + (rounds + parts) * len(lengths)), delay=1.0, desc="Measuring") as bar:
        found = measure(
            configs,
            lengths,
            new_tokens,
            rounds,
            parts=parts,
            loads=loads,
            checkpoint=checkpoint,
            seed=seed,
            tick=bar.update,
        )
    report(found.to_dict(), json_file, lambda: show(found, console()))


def _lengths(text: str) -> list[int]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise typer.BadParameter(f"whole numbers above 0 with commas, found {text!r}", param_hint="--prompt-tokens")
    return [int(part) for part in parts]


def _configs(
    words: list[str], synthetic: str | None, experts: int | None, against: list[str], base: bool
) -> list[BenchConfig]:
    """The configurations to measure, after a check that they fit into memory; writes a synthetic model if it is missing."""
    from ..ground.machine import gib
    from ..integration.chat_config import overridden, read_yaml
    from ..tools.bench.configs import bench_configs
    from ..tools.bench.memory import checkpoint_bytes

    if synthetic is None:
        values = read_yaml(words[0], key_values(words[1:]))
        with usage_errors("--against"):
            configs = bench_configs(values, against, base=base)
        _check_fit(configs, checkpoint_bytes(str(configs[0].config.get("model_name_or_path"))))
        return configs
    from ..tools.bench.shapes import parse_shape
    from ..tools.bench.synthetic import SyntheticModel

    with usage_errors("--synthetic"):
        shape = parse_shape(synthetic, experts)
    made = SyntheticModel.of(shape)
    with usage_errors("--against"):
        configs = bench_configs(overridden(made.values, key_values(words)), against, base=base)
    needs = _check_fit(configs, made.weights)
    each = ", ".join(f"{name} {gib(size)}" for name, size in needs.items())
    typer.echo(f"{made.directory}: {gib(made.weights.total)} on disk; in memory: {each}.", err=True)
    typer.echo(f"Its configuration: {made.build()}", err=True)
    return configs


def _check_fit(configs: list[BenchConfig], weights: CheckpointBytes | None) -> dict[str, int]:
    import torch

    from ..tools.bench.memory import check_fit

    gpus = range(torch.cuda.device_count())
    gpu_memory = sum(torch.cuda.get_device_properties(number).total_memory for number in gpus)
    return check_fit(configs, weights, gpu_memory) if weights else {}


def _show_latency(found: EndpointLatency) -> None:
    def ms(seconds: float) -> str:
        return f"{1000 * seconds:.1f} ms"

    typer.echo(f"{found.model} at {found.endpoint}, {found.requests} requests one after the other")
    typer.echo(f"latency: mean {ms(found.mean)}, p50 {ms(found.p50)}, p90 {ms(found.p90)}, p99 {ms(found.p99)}")
    typer.echo(f"first token: mean {ms(found.first_token_mean)}")
    if found.per_request_rate is not None:
        pieces = "" if found.counted else " (pieces of the stream; the endpoint does not say how many tokens it made)"
        typer.echo(f"tokens/s after the first: mean {found.per_request_rate:.1f}{pieces}")
