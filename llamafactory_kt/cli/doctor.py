"""``llamafactory-kt doctor``: what is in the way of a chat on this machine."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from pathlib import Path

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

_COLOURS = {"ok": "green", "warning": "yellow", "error": "red"}


def doctor(
    config: Path = typer.Argument(
        None, help="YAML for llamafactory-cli chat, to be looked at too.", show_default=False
    ),
    overrides: list[str] = typer.Argument(None, metavar="[KEY=VALUE]...", help="Keys that replace the YAML's."),
    as_json: bool = typer.Option(False, "--json", help="Print JSON."),
) -> None:
    """Check packages, hooks, CPU, memory, GPU and environment variables; with a YAML also model, adapter and their fit."""
    os.environ.setdefault("LLAMAFACTORY_VERBOSITY", "ERROR")  # the findings say it all
    from ..tools.doctor import Status, diagnose

    with contextlib.redirect_stdout(sys.stderr):  # LLaMA-Factory logs to stdout
        findings = diagnose(config, overrides or ())
    count = {status: sum(finding.status is status for finding in findings) for status in Status}
    if as_json:
        content = [{"subject": f.subject, "status": f.status, "text": f.text, "advice": f.advice} for f in findings]
        typer.echo(json.dumps({**count, "findings": content}, ensure_ascii=False, indent=2))
    else:
        table = Table.grid(padding=(0, 2, 0, 0))
        for finding in findings:
            colour = _COLOURS[finding.status]
            text = escape(finding.text) + (f"\n[bold]→[/] {escape(finding.advice)}" if finding.advice else "")
            table.add_row(f"[{colour}]{finding.status}[/]", escape(finding.subject), text)
        console = Console()
        console.print(table)
        console.print(f"{count[Status.ERROR]} error(s), {count[Status.WARNING]} warning(s)", highlight=False)
    if count[Status.ERROR]:
        raise typer.Exit(1)
