"""The command ``llamafactory-kt``; commands that belong together share a file."""

from __future__ import annotations

import sys

import typer

from .._version import __version__
from ..ground.errors import KTError, traceback_wanted
from ..ground.streams import keep_stdout_clean, take_any_text
from .bench import bench
from .checks import doctor, verify
from .conversions import convert, merge, quantize
from .demo import demo
from .estimate import estimate
from .experiments import compare, generate, stats
from .help import HELP, examples
from .inspect import inspect
from .output import Command, without_progress_bars
from .serve import cache, serve

app = typer.Typer(
    name="llamafactory-kt", no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]}, epilog=examples(("demo", "estimate Qwen/Qwen3-30B-A3B", "doctor chat.yaml")),
)  # fmt: skip


def _version(show: bool) -> None:
    if show:
        typer.echo(f"llamafactory-kt-experts {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    context: typer.Context,
    version: bool = typer.Option(
        False, "--version", callback=_version, is_eager=True, help="Show the version and exit."
    ),
) -> None:
    """MoE chats with the routed experts on the CPU, for stock LLaMA-Factory."""
    take_any_text()
    if context.invoked_subcommand != "serve":  # becomes the server, whose stdout is its own
        keep_stdout_clean()


for _command in (
    bench,
    compare,
    convert,
    demo,
    doctor,
    estimate,
    generate,
    inspect,
    merge,
    quantize,
    serve,
    stats,
    verify,
):
    _summary, *_lines = HELP[_command.__name__]
    app.command(cls=Command, short_help=_summary, epilog=examples(_lines))(_command)
app.add_typer(cache, name="cache")


def main() -> None:
    """Entry point: an error is one paragraph, with LLAMAFACTORY_KT_DEBUG=1 a traceback."""
    without_progress_bars()
    try:
        app(prog_name="llamafactory-kt")  # also as python -m llamafactory_kt: completion goes by the name
    except KTError as error:
        if traceback_wanted():
            raise
        typer.echo(f"Error: {error}", err=True)
        sys.exit(1)
