"""``llamafactory-kt doctor`` and ``verify``: what prevents a chat here, and do its experts compute the right thing?"""

from __future__ import annotations

import contextlib
import os
import sys
from dataclasses import asdict
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.markup import escape
from rich.table import Table

from ..ground.errors import ranges
from .output import JSON, OVERRIDES, console, key_values, report
from .quality import CHUNKS, CONTEXT, measured, quality_option, sorted_words

if TYPE_CHECKING:
    from ..tools.bench.quality import QualityReport
    from ..tools.doctor import Finding
    from ..tools.verify import DenseResult, LayerResult

_COLORS = {"ok": "green", "warning": "yellow", "error": "red"}
PROMPT = (
    "Explain in a few sentences what a mixture of experts is, and give one example. 请用中文再说一遍，并举一个例子。 "
    "Then write a Python function that adds 17 and 25."
)


def doctor(
    config: Path = typer.Argument(None, help="Also check this YAML for llamafactory-cli chat."),
    overrides: list[str] = OVERRIDES,
    json_file: Path = JSON,
    verbose: bool = typer.Option(False, "-v", "--verbose", help="Also list what is in order."),
) -> None:
    """Check packages, hooks, CPU, memory, GPU and environment variables; with a YAML also model, adapter and their fit."""
    os.environ.setdefault("LLAMAFACTORY_VERBOSITY", "ERROR")  # its warnings are findings already
    from ..tools.doctor import Status, diagnose

    with contextlib.redirect_stdout(sys.stderr):  # LLaMA-Factory logs to stdout
        findings = diagnose(config, overrides or ())
    count: dict[str, Any] = {status.value: sum(finding.status is status for finding in findings) for status in Status}
    content = {**count, "findings": [asdict(finding) for finding in findings]}
    report(content, json_file, lambda: _show_findings(findings, verbose))
    if count[Status.ERROR]:
        raise typer.Exit(1)


def _show_findings(findings: list[Finding], verbose: bool) -> None:
    """Problems first; what is in order is counted, or listed last."""
    from ..tools.doctor import Status

    found = {status: [finding for finding in findings if finding.status is status] for status in Status}
    table = Table.grid(padding=(0, 2, 0, 0))
    shown = found[Status.ERROR] + found[Status.WARNING] + (found[Status.OK] if verbose else [])
    for finding, following in zip_longest(shown, shown[1:]):
        color, advice = _COLORS[finding.status], finding.advice
        if following and (following.subject, following.advice) == (finding.subject, advice):
            advice = ""  # once, after the last of them
        text = escape(finding.text) + (f"\n[bold]→[/] {escape(advice)}" if advice else "")
        table.add_row(f"[{color}]{finding.status}[/]", escape(finding.subject), text)
    out = console()
    if table.row_count:
        out.print(table)
    rest = f"{len(found[Status.OK])} in order" + ("" if verbose else "; -v lists them")
    counts = f"{len(found[Status.ERROR])} error(s), {len(found[Status.WARNING])} warning(s)"
    out.print(f"{counts}, {rest}.", highlight=False)


def verify(
    words: list[str] = typer.Argument(
        ...,
        metavar="CONFIG [KEY=VALUE]... [TEXT]",
        help="YAML for llamafactory-cli chat, and keys that replace its; with --quality also a text.",
    ),
    layers: str = typer.Option(None, help="Layers to check, for example 1,3-5; default: all with routed experts."),
    prompt: str = typer.Option(PROMPT, help="The text whose hidden states are used.", show_default=False),
    json_file: Path = JSON,
    quality: bool = quality_option("Also say how far the next-token distributions are from float32's"),
    context: int = CONTEXT,
    chunks: int = CHUNKS,
) -> None:
    """Load the model as a chat would. Compare each layer's experts with float32 arithmetic from the files, and all else with the files and
    with what PEFT makes of the adapter."""
    cost: QualityReport | None = None
    asked = None if layers is None else _parse_layers(layers)
    config, text, keys = sorted_words(words) if quality else (words[0], None, key_values(words[1:]))
    with contextlib.redirect_stdout(sys.stderr):  # LLaMA-Factory logs to stdout
        if quality:  # before the model is loaded here: its processes load it, too
            cost = measured(config, text, keys, [], context, chunks)
        results, dense, skipped, merged = _verify(Path(config), keys, asked, prompt)
    failed = [result for result in results if result.problem]
    worst = max(results, key=lambda result: (bool(result.problem), max(result.prompt.total, result.worst.total)))
    others = {"modules": len(dense.modules), "base_weights": dense.base, "problems": dense.problems}
    passed, each = not failed and not dense.problems, [_to_dict(result) for result in results]
    content = {"passed": passed, "worst_layer": worst.layer, "layers": each, "others": others}
    if cost is not None:
        content["quality"] = cost.to_dict()

    def show() -> None:
        _show(results, failed, worst, skipped)
        _show_dense(dense)
        if merged:
            typer.echo("The adapter is merged into the weights: compared as a whole, without its separate effect.")
        if cost is not None:
            from ..tools.bench.quality.table import show as show_quality

            show_quality(cost, console())

    report(content, json_file, show)
    if failed or dense.problems:
        raise typer.Exit(1)


def _verify(
    config: Path, overrides: list[str], layers: list[int] | None, prompt: str
) -> tuple[list[LayerResult], DenseResult, bool, bool]:
    """(experts, all else, whether layers were left out, whether the adapter is merged into the weights)."""
    os.environ.setdefault("LLAMAFACTORY_VERBOSITY", "WARN")
    from tqdm import tqdm

    from ..integration.chat import LoadedChat
    from ..integration.prompts import Prompt
    from ..model.state import kt_state
    from ..tools.verify import record_inputs, verify_dense, verify_layers
    from ..tools.verify.reference import Reference

    chat = LoadedChat.load_yaml(config, overrides)
    reference = Reference(chat.checkpoint, chat.adapters)
    wanted = list(reference.modules) if layers is None else layers
    if missing := sorted({*wanted} - {*reference.modules}):
        raise typer.BadParameter(
            f"no routed experts in {ranges(missing)}; the model has them in {ranges(reference.modules)}",
            param_hint="--layers",
        )
    ids = chat.encode(Prompt(0, messages=[{"role": "user", "content": prompt}])).ids
    inputs = record_inputs(chat.model, ids)
    chosen = {layer: inputs[layer] for layer in wanted}
    steps = verify_layers(chat.model, chosen, reference)
    results = list(tqdm(steps, total=len(chosen), desc="Verifying layers", delay=1.0))
    merged = kt_state(chat.model).merged is not None and bool(chat.adapters.adapters)
    dense = verify_dense(chat.model, chat.checkpoint, chat.adapters, chat.config.get("kt_lora_scope") or "all")
    return results, dense, len(chosen) < len(inputs), merged


def _parse_layers(text: str) -> list[int]:
    """Parse ``--layers``.

    >>> _parse_layers("1,3-5")
    [1, 3, 4, 5]
    """
    numbers: set[int] = set()
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise typer.BadParameter(f"numbers and ranges such as 1,3-5, found {text!r}", param_hint="--layers")
        numbers |= set(range(int(first), int(last or first) + 1))
    return sorted(numbers)


def _to_dict(result: LayerResult) -> dict[str, Any]:
    return {
        "layer": result.layer,
        "engine": result.engine,
        "passed": not result.problem,
        "problem": result.problem or None,
        "prompt": asdict(result.prompt),
        "worst_expert": {"expert": result.worst_expert, **asdict(result.worst)},
    }


def _show(results: list[LayerResult], failed: list[LayerResult], worst: LayerResult, skipped: bool) -> None:
    out = console()
    titles = ("layer", "base", "with LoRA", "effect", "strength", "cosine", "expert", "error", "")
    frame: dict[str, Any] = {} if out.width >= 85 else {"box": SIMPLE_HEAD, "padding": (0, 1, 0, 0)}  # fits 80 columns
    table = Table(*titles, **frame)
    for result in results:
        found = result.prompt
        lora = ["-", "none", "-"]
        if found.strength is not None:
            lora = [f"{found.total:.4f}", f"{found.effect:.3g}", f"{found.strength:.3f}"]
        cosine = f"{found.cosine:.4f}" if found.cosine is not None else "-"
        mark = "[bold red]wrong[/]" if result.problem else "[green]right[/]"
        expert = [str(result.worst_expert), f"{result.worst.total:.4f}"]
        table.add_row(str(result.layer), f"{found.base:.4f}", *lora, cosine, *expert, mark)
    out.print(table)
    for result in failed:
        out.print(f"layer {result.layer}: {escape(result.problem)}", highlight=False)
    verdict = f"{len(failed)} of {len(results)} layers are wrong" if failed else f"All {len(results)} layers are right"
    more = " (others were not asked for)" if skipped else ""
    out.print(f"{verdict}{more}; engine {worst.engine}; worst: layer {worst.layer}.", highlight=False)


def _show_dense(dense: DenseResult) -> None:
    out = console()
    for problem in dense.problems:
        out.print(escape(problem), highlight=False)
    wrong = sum(bool(module.comparison.problem) for module in dense.modules)
    text = f"{wrong} of {len(dense.modules)} other modules with LoRA or weights of their own are wrong"
    if not wrong:
        text = (
            f"All {len(dense.modules)} other modules with LoRA or weights of their own are right"
            if dense.modules
            else ""
        )
    base = f"without adapters, {dense.base - len(dense.differing)} of {dense.base} other weights are the checkpoint's, bit for bit"
    out.print("; ".join(filter(None, [text, base if dense.base else ""])) + ".", highlight=False)
