"""What all commands share: overrides, ``--json``, and output that is whole where it is piped."""

from __future__ import annotations

import contextlib
import json
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, cast

import typer
from typer.core import TyperCommand

from ..ground.errors import KTConfigError

if TYPE_CHECKING:
    from rich.console import Console

_JSON = "--json"
JSON: Any = typer.Option(
    None,
    _JSON,
    metavar="[FILE]",
    dir_okay=False,
    help="All figures as JSON, to a file; without one, or with -, to standard output in place of the text.",
)
_ANY_WIDTH = 10_000
"""columns: wider than any table"""


_TYPES = {
    "list[str]": "TEXT",
    "str": "TEXT",
    "path": "PATH",
    "file": "FILE",
    "int": "N",
    "int range": "N",
    "float": "X",
}
"""as typer names what an option takes -> in a help text"""


class Command(TyperCommand):
    """A command whose ``--json`` may stand without a file, and whose help names what is to be given, without Python's types."""

    def collect_usage_pieces(self, ctx: Any) -> list[str]:
        return ["[OPTIONS]", *(_given(param) for param in self.get_params(ctx) if param.param_type_name == "argument")]

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """The two lists of a help text."""
        lists: dict[str, list[tuple[str, str]]] = {"argument": [], "option": []}
        for param in self.get_params(ctx):
            if (record := param.get_help_record(ctx)) is not None:
                option = re.sub("<([^<>]+)>", lambda found: _TYPES.get(found[1], found[1]), record[0])
                kind = param.param_type_name
                lists[kind].append((_given(param) if kind == "argument" else option, record[1]))
        for kind, records in lists.items():
            if records:
                with formatter.section(f"{kind.capitalize()}s"):
                    formatter.write_dl(records)

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """A word after ``--json`` that is an option, a ``key=value``, a configuration or a directory is no file to write."""
        words = args[: args.index("--")] if "--" in args else args
        if _JSON in words:
            place = args.index(_JSON) + 1
            if place == len(words) or not _is_output(args[place]):
                args = [*args[:place], "-", *args[place:]]
        return super().parse_args(ctx, args)


def _given(argument: Any) -> str:
    """An argument's name as a help text has it."""
    if argument.metavar is not None:
        return str(argument.metavar)
    name: str = argument.name.upper()
    return name if argument.required else f"[{name}]"


def _is_output(word: str) -> bool:
    """
    >>> [_is_output(word) for word in ("-", "figures.json", "--rounds", "kt_load=mmap", "chat.yaml")]
    [True, True, False, False, False]
    """
    given = word.startswith("-") or "=" in word or word.endswith((".yaml", ".yml")) or Path(word).is_dir()
    return word == "-" or not given


def one_of(words: Sequence[str]) -> Callable[[], list[str]]:
    """What a shell completes an option's value with; typer keeps those that begin as what is typed."""
    return lambda: list(words)


def key_values(words: Sequence[str] | None) -> list[str]:
    """Words that replace a configuration's keys; another word is a usage error."""
    if wrong := [word for word in words or () if "=" not in word]:
        raise typer.BadParameter(f"expected key=value, found {wrong[0]!r}")
    return list(words or ())


OVERRIDES: Any = typer.Argument(
    None, metavar="[KEY=VALUE]...", callback=key_values, help="Keys in place of the configuration's."
)

SEED: Any = typer.Option(None, min=0, max=2**32 - 1, help="Sampling seed.")
OUTPUT: Any = typer.Option(..., help="Directory to write; must not exist or be empty, without --overwrite.")
OVERWRITE: Any = typer.Option(False, "--overwrite", help="Replace what an earlier run wrote.")


@contextlib.contextmanager
def usage_errors(option: str | None = None) -> Iterator[None]:
    """Around what reads an option's words, or those of all options: what is wrong with them is the usage, which ends with exit code 2."""
    try:
        yield
    except KTConfigError as error:
        text = str(error).removeprefix(f"{option}: ")
        raise typer.BadParameter(text, param_hint=option) from error


def console() -> Console:
    """For tables and text on standard output. Where that is no terminal, nothing is cut, wrapped or colored."""
    from rich.console import Console

    if sys.stdout.isatty():
        return Console()
    return Console(file=cast(IO[str], _Trimmed()), width=_ANY_WIDTH, color_system=None, force_terminal=False)


class _Trimmed:
    """Standard output without the blanks with which rich fills a table's lines."""

    def write(self, text: str) -> int:
        return sys.stdout.write(re.sub(r" +$", "", text, flags=re.MULTILINE))

    def flush(self) -> None:
        sys.stdout.flush()


def without_progress_bars() -> None:
    """Where stderr is no terminal, no library draws any: neither here nor in processes of ours."""
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


def report(content: Any, json_file: Path | None, show: Callable[[], None]) -> None:
    """Write JSON if a file is given; show the text unless the JSON goes to stdout.

    Raises:
        KTOutputError: The file cannot be written.
    """
    from ..ground.atomic_output import replacing, writing

    text = json.dumps(content, indent=2, ensure_ascii=False)
    if str(json_file) == "-":
        typer.echo(text)
        return
    show()
    if json_file is not None:
        special = json_file.exists() and not json_file.is_file()  # /dev/stderr, a pipe
        with writing(json_file), contextlib.nullcontext(json_file) if special else replacing(json_file) as file:
            file.write_text(text + "\n", encoding="utf-8")
