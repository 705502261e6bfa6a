"""``llamafactory-kt verify``: does every layer compute what checkpoint and adapter say?"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ..ground.errors import KTConfigError, name_some

if TYPE_CHECKING:
    from ..tools.verify import LayerResult

PROMPT = (
    "Explain in a few sentences what a mixture of experts is, and give one example. 请用中文再说一遍，并举一个例子。 "
    "Then write a Python function that adds 17 and 25."
)


def verify(
    config: Path = typer.Argument(..., help="YAML for llamafactory-cli chat."),
    overrides: list[str] = typer.Argument(None, metavar="[KEY=VALUE]...", help="Keys that replace the YAML's."),
    layers: str = typer.Option(
        None, help="Layers to check, for example 1,3-5; default: all with routed experts.", show_default=False
    ),
    prompt: str = typer.Option(PROMPT, help="The text whose hidden states are used.", show_default=False),
    as_json: bool = typer.Option(False, "--json", help="Print JSON."),
) -> None:
    """Load the model as a chat would, and compare each layer's experts with float32 arithmetic from the files."""
    with contextlib.redirect_stdout(sys.stderr):  # LLaMA-Factory logs to stdout
        results, skipped, merged = _verify(config, overrides or [], layers, prompt)
    failed = [result for result in results if result.problem]
    worst = max(results, key=lambda result: (bool(result.problem), _farthest(result)))
    if as_json:
        content = {"passed": not failed, "worst_layer": worst.layer, "layers": [_to_dict(result) for result in results]}
        typer.echo(json.dumps(content, ensure_ascii=False, indent=2))
    else:
        _show(results, worst, skipped)
        if merged:
            typer.echo("The adapter is merged into the weights: compared as a whole, its effect is not seen apart.")
    if failed:
        raise typer.Exit(1)


def _verify(
    config: Path, overrides: list[str], layers: str | None, prompt: str
) -> tuple[list[LayerResult], bool, bool]:
    """(results, whether layers were left out, whether the adapter is merged into the weights)."""
    os.environ.setdefault("LLAMAFACTORY_VERBOSITY", "WARN")
    from tqdm import tqdm

    from ..integration.chat import LoadedChat
    from ..integration.prompts import Prompt
    from ..model.state import kt_state
    from ..tools.verify import record_inputs, verify_layers
    from ..tools.verify.reference import Reference

    chat = LoadedChat.load_yaml(config, overrides)
    reference = Reference(chat.checkpoint, chat.adapters)
    wanted = _numbers(layers, list(reference.modules))
    ids, _ = chat.encode(Prompt(0, messages=[{"role": "user", "content": prompt}]))
    inputs = record_inputs(chat.model, ids)
    chosen = {layer: inputs[layer] for layer in wanted}
    steps = verify_layers(chat.model, chosen, reference)
    results = list(tqdm(steps, total=len(chosen), desc="Verifying layers", delay=1.0))
    merged = kt_state(chat.model).merged is not None and bool(chat.adapters.adapters)
    return results, len(chosen) < len(inputs), merged


def _numbers(text: str | None, known: list[int]) -> list[int]:
    """``1,3-5`` as numbers.

    >>> _numbers("1,3-5", [1, 2, 3, 4, 5])
    [1, 3, 4, 5]
    """
    if text is None:
        return known
    numbers: set[int] = set()
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise KTConfigError(f"--layers must be numbers and ranges such as 1,3-5, found {text!r}.")
        numbers |= set(range(int(first), int(last or first) + 1))
    if missing := sorted(numbers - set(known)):
        raise KTConfigError(
            f"--layers: {name_some(missing)} have no routed experts; the model's layers that do are {name_some(known, 8)}."
        )
    return sorted(numbers)


def _farthest(result: LayerResult) -> float:
    return max(result.prompt.total, result.experts[result.worst_expert].total)


def _to_dict(result: LayerResult) -> dict[str, Any]:
    return {
        "layer": result.layer,
        "engine": result.engine,
        "passed": not result.problem,
        "problem": result.problem or None,
        "prompt": asdict(result.prompt),
        "worst_expert": {"expert": result.worst_expert, **asdict(result.experts[result.worst_expert])},
    }


def _show(results: list[LayerResult], worst: LayerResult, skipped: bool) -> None:
    console = Console()
    table = Table("layer", "base", "with LoRA", "effect", "strength", "cosine", "expert", "error", "", padding=(0, 1))
    for result in results:
        found, expert = result.prompt, result.experts[result.worst_expert]
        table.add_row(
            str(result.layer),
            f"{found.base:.4f}",
            f"{found.total:.4f}" if found.strength is not None else "-",
            f"{found.effect:.3g}" if found.strength is not None else "none",
            f"{found.strength:.3f}" if found.strength is not None else "-",
            f"{found.cosine:.4f}" if found.cosine is not None else "-",
            str(result.worst_expert),
            f"{expert.total:.4f}",
            "[bold red]wrong[/]" if result.problem else "[green]right[/]",
        )
    console.print(table)
    for result in results:
        if result.problem:
            console.print(f"layer {result.layer}: {escape(result.problem)}", highlight=False, soft_wrap=True)
    failed = sum(bool(result.problem) for result in results)
    verdict = f"{failed} of {len(results)} layers are wrong" if failed else f"All {len(results)} layers are right"
    more = " (others were not asked for)" if skipped else ""
    console.print(
        f"{verdict}{more}; engine {worst.engine}; worst: layer {worst.layer}.", highlight=False, soft_wrap=True
    )
