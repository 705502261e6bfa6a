"""What a configuration's precision costs, for ``bench --quality`` and ``verify --quality``."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from ..tools.bench.quality import QualityReport

_YAML = (".yaml", ".yml", ".json")
CONTEXT = typer.Option(512, min=4, help="Tokens of a chunk of the text; those of its second half count.")
CHUNKS = typer.Option(8, min=1, help="The most chunks.")


def quality_option(text: str) -> Any:
    """``--quality``, whose text is one of the command's words."""
    return typer.Option(False, "--quality", help=f"{text}, on a text; without one, on the package's own.")


def sorted_words(words: Iterable[str]) -> tuple[str, Path | None, list[str]]:
    """(configuration, text, ``KEY=VALUE``s); the text may stand before the configuration, right after ``--quality``.

    >>> sorted_words(["my.txt", "chat.yaml", "kt_backend=INT4"])
    ('chat.yaml', PosixPath('my.txt'), ['kt_backend=INT4'])
    """
    words = list(words)
    keys = [word for word in words if "=" in word and not Path(word).is_file()]
    files = sorted((word for word in words if word not in keys), key=lambda word: not word.endswith(_YAML))
    if len(files) not in (1, 2):
        raise typer.BadParameter(
            f"--quality takes a configuration and at most one text, found {', '.join(files) or 'none'}"
        )
    return files[0], Path(files[1]) if len(files) == 2 else None, keys


def measured(
    config: str, text: Path | None, keys: list[str], against: Sequence[str], context: int, chunks: int
) -> QualityReport:
    """Compare a configuration, and its variants, with the same in float32; progress goes to stderr."""
    from tqdm import tqdm

    from ..integration.chat_config import read_yaml
    from ..tools.bench.configs import bench_configs
    from ..tools.bench.quality import Text, measure_quality

    read = Text.read(text)
    configs = bench_configs(read_yaml(config, keys), against, base=False)
    with tqdm(total=(1 + len(configs)) * chunks, delay=1.0, desc="Measuring") as bar:

        def tick(total: int) -> None:
            bar.total = total  # the text may have fewer chunks
            bar.update()

        return measure_quality(configs, read, context, chunks, tick)
