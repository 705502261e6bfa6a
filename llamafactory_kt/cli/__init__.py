"""The command ``llamafactory-kt``: one file a command."""

from __future__ import annotations

import sys

import typer

from .._version import __version__
from ..ground.errors import KTError, traceback_wanted
from .bench import bench
from .cache import app as cache
from .compare import compare
from .convert import convert
from .demo import demo
from .doctor import doctor
from .generate import generate
from .inspect import inspect
from .merge import merge
from .quantize import quantize
from .serve import serve
from .stats import stats
from .verify import verify

app = typer.Typer(
    name="llamafactory-kt",
    help="MoE chats with the routed experts on the CPU, for stock LLaMA-Factory.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _version(show: bool) -> None:
    if show:
        typer.echo(f"llamafactory-kt-experts {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: bool = typer.Option(
        False, "--version", callback=_version, is_eager=True, help="Show the version and exit."
    ),
) -> None:
    """MoE chats with the routed experts on the CPU, for stock LLaMA-Factory."""


app.command()(bench)
app.command()(compare)
app.command()(convert)
app.command()(demo)
app.command()(doctor)
app.command()(generate)
app.command()(inspect)
app.command()(merge)
app.command()(quantize)
app.command()(serve)
app.command()(stats)
app.command()(verify)
app.add_typer(cache, name="cache")


def main() -> None:
    """Entry point of the command line: errors are one paragraph, with LLAMAFACTORY_KT_DEBUG=1 a traceback."""
    try:
        app()
    except KTError as error:
        if traceback_wanted():
            raise
        typer.echo(f"Error: {error}", err=True)
        sys.exit(1)
