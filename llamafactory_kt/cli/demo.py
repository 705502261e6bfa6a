"""``llamafactory-kt demo``: the same prompts without and with an adapter, through ``llamafactory-cli chat``."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import typer
import yaml
from rich.markup import escape
from rich.table import Table

from ..ground.atomic_output import temporary_directory, writing
from ..ground.errors import KTPathError
from ..ground.travelling import travelling
from .output import JSON, console, report

EXAMPLE = "examples/demo"
PROMPTS = [
    "你好，请介绍一下你自己。", "什么是混合专家模型？", "Hello, who are you?", "What is LoRA?", "Tell me a joke.",
]  # fmt: skip
_USER, _ASSISTANT = "User: ", "Assistant: "


def demo(
    directory: Path = typer.Option(
        None, help="Directory with model/ and adapter/; default: those that come with the package."
    ),
    log: bool = typer.Option(False, "--log", help="Also show what llamafactory-cli logs while it loads."),
    json_file: Path = JSON,
) -> None:
    """Answer the same prompts with the base model and with its adapter, on the CPU alone."""
    directory = directory or travelling(EXAMPLE)
    for part in ("model", "adapter"):
        if not (directory / part).is_dir():
            raise KTPathError(
                f"{directory} holds no {part}/, which the demo needs. Without --directory, it takes those that come with the package."
            )
    config: dict[str, Any] = {
        "model_name_or_path": str(directory / "model"), "template": "deepseek", "infer_backend": "huggingface",
        "use_kt": True, "do_sample": False,
    }  # fmt: skip
    adapter = {"adapter_name_or_path": str(directory / "adapter")}
    base, changed = (
        chat({**config, **extra}, PROMPTS, f"{number} of 2: llamafactory-cli chat with {title}", log)
        for number, (title, extra) in enumerate((("the base model", {}), ("its adapter", adapter)), start=1)
    )
    rows = list(zip(PROMPTS, base, changed, strict=True))
    content = {"answers": [{"prompt": prompt, "base": one, "adapter": other} for prompt, one, other in rows]}
    report(content, json_file, lambda: _show(rows))
    if base == changed:
        typer.echo("The adapter changed nothing: something is wrong.", err=True)
        raise typer.Exit(1)


def _show(rows: list[tuple[str, str, str]]) -> None:
    table = Table(title="The same prompts, greedy answers", title_justify="left", show_lines=True)
    for column in ("prompt", "base model", "with adapter"):
        table.add_column(column, overflow="fold")  # Chinese has no spaces to wrap at
    for row in rows:
        table.add_row(*map(escape, row))
    console().print(table)


def chat(config: dict[str, Any], prompts: list[str], title: str, log: bool = False) -> list[str]:
    """Pipe the prompts through ``llamafactory-cli chat``, each in its own conversation.

    Args:
        title: says on stderr what runs.
        log: show there what it logs, too.
    """
    lines = [line for prompt in prompts for line in (prompt, "clear")] + ["exit"]
    with temporary_directory("llamafactory-kt-demo-") as folder:
        path = folder / "config.yaml"
        with writing(path):
            path.write_text(yaml.safe_dump(config, allow_unicode=True), encoding="utf-8")
        typer.echo(f"{title} ...", err=True)
        result = subprocess.run(
            [sys.executable, "-m", "llamafactory.cli", "chat", path], input="\n".join(lines) + "\n", capture_output=True,
            encoding="utf-8", env={**os.environ, "PYTHONIOENCODING": "utf-8"},
        )  # fmt: skip
    if result.returncode:
        sys.stderr.write(result.stdout + result.stderr)
        raise typer.Exit(1)
    before, _, conversation = result.stdout.partition(f"\n{_USER}")
    if log:
        typer.echo(before, err=True)
    turns = conversation.split(f"\n{_USER}")
    return [turn.removeprefix(_ASSISTANT).strip() for turn in turns if turn.startswith(_ASSISTANT)]
