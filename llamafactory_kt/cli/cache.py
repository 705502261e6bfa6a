"""``llamafactory-kt cache``: the adapters that were prepared for SGLang."""

from __future__ import annotations

from datetime import datetime

import typer

app = typer.Typer(help="Adapters that were prepared for SGLang: list them, remove them.", no_args_is_help=True)


@app.command("list")
def list_entries() -> None:
    """Show what is there, where it came from and how large it is."""
    from ..ground.machine import cache_directory, gib
    from ..serving.adapter_cache import entries

    found = entries()
    for entry in found:
        made = datetime.fromtimestamp(entry.created).strftime("%Y-%m-%d %H:%M")
        typer.echo(f"{entry.source}{'' if entry.source_exists else ' (gone)'}")
        typer.echo(f"    {entry.path.name}: {entry.form}, {gib(entry.nbytes)}, made {made}")
    size = gib(sum(entry.nbytes for entry in found))
    typer.echo(f"{len(found)} prepared adapter(s), {size}, in {cache_directory() / 'adapters'}")


@app.command("clean")
def clean_entries(
    gone: bool = typer.Option(False, "--gone", help="Only those whose adapter is no longer there."),
) -> None:
    """Remove prepared adapters. A server that runs has read its own already; the next start prepares it again."""
    from ..ground.machine import gib
    from ..serving.adapter_cache import clean

    removed = clean((lambda entry: entry.source_exists) if gone else (lambda entry: False))
    typer.echo(f"Removed {len(removed)} prepared adapter(s), {gib(sum(entry.nbytes for entry in removed))}.")
