"""``llamafactory-kt demo``: the same prompts without and with an adapter, through ``llamafactory-cli chat``."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import typer
import yaml
from rich.console import Console
from rich.table import Table

from ..ground.atomic_output import temporary_directory, writing

EXAMPLE = Path("examples/demo")
PROMPTS = [
    "你好，请介绍一下你自己。", "什么是混合专家模型？", "Hello, who are you?", "What is LoRA?", "Tell me a joke.",
]  # fmt: skip
_USER, _ASSISTANT = "User: ", "Assistant: "


def demo(
    directory: Path = typer.Option(
        None, help="Directory with model/ and adapter/; default: examples/demo of the source tree."
    ),
    log: bool = typer.Option(False, "--log", help="Also show what llamafactory-cli logs while it loads."),
) -> None:
    """Answer the same prompts with the base model and with its adapter, on the CPU alone."""
    directory = directory or _find_example()
    console = Console()
    config: dict[str, Any] = {
        "model_name_or_path": str(directory / "model"), "template": "deepseek", "infer_backend": "huggingface",
        "use_kt": True, "do_sample": False,
    }  # fmt: skip
    adapter = {"adapter_name_or_path": str(directory / "adapter")}
    answers = []
    for title, extra in (("the base model", {}), ("the model with its adapter", adapter)):
        console.print(f"[bold]llamafactory-cli chat[/] with {title} ...")
        answers.append(chat({**config, **extra}, PROMPTS, console if log else None))
    table = Table(title="The same prompts, greedy answers", show_lines=True)
    for column in ("prompt", "base model", "with adapter"):
        table.add_column(column, overflow="fold")  # Chinese has no spaces to wrap at
    for row in zip(PROMPTS, *answers, strict=True):
        table.add_row(*row)
    console.print(table)
    if answers[0] == answers[1]:
        console.print("[bold red]The adapter changed nothing: something is wrong.[/]")
        raise typer.Exit(1)


def chat(config: dict[str, Any], prompts: list[str], console: Console | None = None) -> list[str]:
    """Pipe the prompts through ``llamafactory-cli chat``, each in its own conversation."""
    command = Path(sysconfig.get_path("scripts")) / "llamafactory-cli"
    lines = [line for prompt in prompts for line in (prompt, "clear")] + ["exit"]
    with temporary_directory("llamafactory-kt-demo-") as folder:
        path = folder / "config.yaml"
        with writing(path):
            path.write_text(yaml.safe_dump(config, allow_unicode=True), encoding="utf-8")
        result = subprocess.run(
            [command, "chat", path], input="\n".join(lines) + "\n", capture_output=True, encoding="utf-8",
            env={**os.environ, "PYTHONIOENCODING": "utf-8"},
        )  # fmt: skip
    if result.returncode:
        sys.stderr.write(result.stdout + result.stderr)
        raise typer.Exit(result.returncode)
    log, _, conversation = result.stdout.partition(f"\n{_USER}")
    if console:
        console.print(log, markup=False, highlight=False)
    turns = conversation.split(f"\n{_USER}")
    return [turn.removeprefix(_ASSISTANT).strip() for turn in turns if turn.startswith(_ASSISTANT)]


def _find_example() -> Path:
    """The example of the source tree (for editable installs), or below the working directory."""
    for root in (Path(__file__).parents[2], Path.cwd()):
        if (root / EXAMPLE / "model" / "config.json").is_file():
            return root / EXAMPLE
    typer.echo(f"{EXAMPLE} is not here; run this in a clone of the repository, or give --directory.", err=True)
    raise typer.Exit(1)
