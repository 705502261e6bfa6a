"""``llamafactory-kt serve`` and ``cache``: a configuration's SGLang server, and the adapters prepared for it."""

from __future__ import annotations

import logging
import os
import socket
import sys
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from dataclasses import asdict
from datetime import datetime
from itertools import takewhile
from pathlib import Path
from typing import Any

import typer

from ..ground.errors import KTConfigError, KTServerError
from .help import HELP, examples
from .output import JSON, Command, key_values, report

cache = typer.Typer(
    help="List or remove the adapters prepared for SGLang.", no_args_is_help=True,
    epilog=examples(line for name, lines in HELP.items() if name.startswith("cache ") for line in lines[1:]),
)  # fmt: skip


def serve(
    config: Path = typer.Argument(..., help="LLaMA-Factory YAML with use_kt: true."),
    words: list[str] = typer.Argument(
        None,
        metavar="[KEY=VALUE]... [-- SGLANG OPTIONS]",
        help="Keys in place of the configuration's; after --, further SGLang options, which take precedence.",
    ),
    dry_run: bool = typer.Option(False, "--dry-run", help="Print the command and exit; the adapter is still prepared."),
) -> None:
    """Start SGLang's server with the configuration's model, adapter and KT options; this process becomes the server."""
    logging.basicConfig(level=logging.INFO, format="%(levelname)s: %(message)s", stream=sys.stderr, force=True)
    os.environ.setdefault("LLAMAFACTORY_VERBOSITY", "WARN")
    from ..serving.command import server_command
    from ..serving.options import discover

    words = words or []
    keys = key_values(list(takewhile(lambda word: not word.startswith("-"), words)))
    with redirect_stdout(sys.stderr):  # LLaMA-Factory logs to stdout, which is for the command
        args = model_arguments(config, keys)
        command = server_command(args, discover(args.kt_sglang_python), words[len(keys) :])
    for notice in filter(None, [*command.notices, command.request_notice]):
        typer.echo(f"Note: {notice}", err=True)
    if dry_run:
        typer.echo(str(command))
        return
    _check_port(command.parsed.host, command.parsed.port)
    typer.echo(str(command), err=True)
    os.execvpe(command.python, command.words, {**os.environ, "LLAMAFACTORY_KT_DISABLE": "1"})


def model_arguments(path: Path, overrides: Sequence[str] = ()) -> Any:
    """Parse a YAML, with keys replaced, into LLaMA-Factory's ModelArguments, with the checks of ``infer_backend: sglang``.

    Raises:
        KTPathError: There is no such file.
        KTConfigError: The file is not a configuration, or a key in it is wrong.
    """
    from ..integration.bootstrap import activate
    from ..integration.chat_config import parse_from, read_yaml

    keys = read_yaml(path, overrides)
    if keys.get("use_kt") is not True:
        raise KTConfigError(f"{path} must be a LLaMA-Factory configuration with use_kt: true.")
    activate()
    return parse_from(path, {**keys, "infer_backend": "sglang"})


def _check_port(host: str, port: int) -> None:
    """Fail before the model is loaded if the port is taken."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections of the last server may linger
        try:
            probe.bind((host, port))
        except OSError as error:
            raise KTServerError(
                f"Port {port} of {host} cannot be used: {error.strerror}. Choose another: "
                "llamafactory-kt serve CONFIG -- --port N"
            ) from error


def _command(name: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """``cache NAME``, with its help."""
    summary, *lines = HELP[f"cache {name}"]
    return cache.command(name, cls=Command, short_help=summary, epilog=examples(lines))


@_command("list")
def list_entries(json_file: Path = JSON) -> None:
    """List prepared adapters with their source and size."""
    from ..ground.machine import cache_directory, gib
    from ..serving.adapter_cache import entries

    found = entries()
    size = sum(entry.nbytes for entry in found)

    def show() -> None:
        for entry in found:
            made = datetime.fromtimestamp(entry.created).strftime("%Y-%m-%d %H:%M")
            typer.echo(f"{entry.source}{'' if entry.source_exists else ' (gone)'}")
            typer.echo(f"    {entry.path.name}: {entry.form}, {gib(entry.nbytes)}, made {made}")
        typer.echo(f"{len(found)} prepared adapter(s), {gib(size)}, in {cache_directory() / 'adapters'}")

    listed = [{**asdict(entry), "path": str(entry.path), "source_exists": entry.source_exists} for entry in found]
    report({"directory": str(cache_directory() / "adapters"), "nbytes": size, "entries": listed}, json_file, show)


@_command("clean")
def clean_entries(
    gone: bool = typer.Option(False, "--gone", help="Only those whose source no longer exists."),
    json_file: Path = JSON,
) -> None:
    """Remove prepared adapters. A running server keeps working; its next start prepares the adapter again."""
    from ..ground.machine import gib
    from ..serving.adapter_cache import clean

    removed = clean((lambda entry: entry.source_exists) if gone else (lambda entry: False))
    size = sum(entry.nbytes for entry in removed)
    content = {"removed": [str(entry.path) for entry in removed], "nbytes": size}
    report(content, json_file, lambda: typer.echo(f"Removed {len(removed)} prepared adapter(s), {gib(size)}."))
