"""Load the reference and each configuration, one after the other, and compare them on a text."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ....ground.errors import KTDataError, KTPathError
from ....integration.chat_config import kt_keys
from ..configs import BenchConfig
from ..processes import refuse_wrong_keys, worker
from .results import QualityReport, QualityResult
from .worker import Cut, serve_compared, serve_reference

REFERENCE = "the reference"
_EXACT = {"use_kt": True, "kt_backend": "torch"}
"""keeps the experts' weights as they are in the checkpoint, and computes with them in float32"""
_KEPT = ("kt_lora_scope", "kt_moe_lora_path")
"""of our keys, those that say what is computed, not how"""


@dataclass(frozen=True)
class Text:
    """A text and its name."""

    name: str
    content: str

    @classmethod
    def read(cls, path: Path | None = None) -> Text:
        """Read a file, or the package's own text: some pages of English and a little code.

        Raises:
            KTPathError: There is no such file.
            KTDataError: It is empty, or not UTF-8.
        """
        file = (path or Path(__file__).with_name("text.txt")).expanduser()
        if not file.is_file():
            raise KTPathError(f"{file}: the text to measure on does not exist or is not a file.")
        try:
            content = file.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise KTDataError(f"{file} is not a text in UTF-8: {error}.") from error
        if not content.strip():
            raise KTDataError(f"{file} is empty; --quality needs a text of some thousand words.")
        return cls(file.name if path is None else str(path), content)


def reference_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """The same model and adapter in float32."""
    others = {key: value for key, value in config.items() if not key.startswith("kt_") and key != "flash_attn"}
    ours = {key: value for key, value in kt_keys(config).items() if key in _KEPT}
    return others | ours | _EXACT  # FlashAttention takes no float32


def measure_quality(
    configs: Sequence[BenchConfig], text: Text, context: int = 512, limit: int = 8, tick: Callable[[int], object] = lambda total: None,
) -> QualityReport:  # fmt: skip
    """Compare next-token distributions with those of the first configuration's model in float32, each loaded in its own process.

    Args:
        context: tokens of a chunk of the text.
        limit: the most chunks; the reference's distributions take ``4 * context / 2 * vocabulary`` bytes of disk for each.
        tick: called after each chunk with the number of all chunks of all models.

    Raises:
        KTError: The text is too short, the disk too small, or a configuration cannot be loaded; the message says which.
    """
    refuse_wrong_keys([config for config in configs if not config.stock])
    cut = Cut(context, limit)
    reference = BenchConfig(REFERENCE, reference_config(configs[0].config))
    with tempfile.TemporaryDirectory(prefix="llamafactory-kt-quality-") as directory:
        folder, losses, rows = Path(directory), list[list[float]](), list[QualityResult]()
        with worker(REFERENCE, serve_reference, reference, text.name, text.content, cut, folder) as (loaded, ask):
            engine, tokens = loaded
            used = len(tokens.chunks)
            for number in range(used):
                losses.append(ask(number))
                tick(used * (1 + len(configs)))
        for config in configs:
            with worker(config.name, serve_compared, config, tokens.chunks, cut, folder) as ((computed_by,), ask):
                found = []
                for number in range(used):
                    found.append(ask(number))
                    tick(used * (1 + len(configs)))
            rows.append(QualityResult.of(config.name, computed_by, found, losses))
    perplexity = math.exp(float(np.concatenate(losses).mean()))
    return QualityReport(text.name, tokens.total, used, context, used * cut.predicted, engine, perplexity, rows)
