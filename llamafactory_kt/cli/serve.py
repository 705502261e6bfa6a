"""``llamafactory-kt serve``: the SGLang server of a configuration, without LLaMA-Factory around it."""

from __future__ import annotations

import logging
import os
import socket
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import typer

from ..ground.errors import KTConfigError, KTServerError


def serve(
    config: Path = typer.Argument(..., help="LLaMA-Factory YAML with use_kt: true."),
    extra: list[str] = typer.Argument(
        None, metavar="[-- SGLANG OPTIONS]", help="More of SGLang's options, after --; they win.", show_default=False
    ),
    dry_run: bool = typer.Option(
        False, "--dry-run", help="Print the command and end; the adapter is prepared all the same."
    ),
) -> None:
    """Become `python -m sglang.launch_server` with the configuration's model, adapter and KT options."""
    logging.basicConfig(level=logging.INFO, format="%(levelname)s: %(message)s", stream=sys.stderr, force=True)
    os.environ.setdefault("LLAMAFACTORY_VERBOSITY", "WARN")
    from ..serving.command import server_command
    from ..serving.options import discover

    with redirect_stdout(sys.stderr):  # where LLaMA-Factory logs; stdout is for the command alone
        args = model_arguments(config)
        command = server_command(args, discover(args.kt_sglang_python), extra or [])
    for notice in filter(None, [*command.notices, command.request_notice]):
        typer.echo(f"Note: {notice}", err=True)
    if dry_run:
        typer.echo(str(command))
        return
    _check_port(command.parsed.host, command.parsed.port)
    typer.echo(str(command), err=True)
    os.execvpe(command.python, command.words, {**os.environ, "LLAMAFACTORY_KT_DISABLE": "1"})


def model_arguments(path: Path) -> Any:
    """LLaMA-Factory's ModelArguments of a YAML, checked as for ``infer_backend: sglang``.

    Raises:
        KTPathError: There is no such file.
        KTConfigError: The file is not a configuration, or a key in it is wrong.
    """
    from ..integration.bootstrap import activate
    from ..integration.chat_config import parse_from, read_yaml

    keys = read_yaml(path)
    if keys.get("use_kt") is not True:
        raise KTConfigError(f"{path} must be a LLaMA-Factory configuration with use_kt: true.")
    activate()
    return parse_from(path, {**keys, "infer_backend": "sglang"})


def _check_port(host: str, port: int) -> None:
    """A port that is taken is told now, and not after the model was loaded."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # connections of the last server may linger
        try:
            probe.bind((host, port))
        except OSError as error:
            raise KTServerError(
                f"Port {port} of {host} cannot be used: {error.strerror}. Choose another: "
                "llamafactory-kt serve CONFIG -- --port N"
            ) from error
