"""Which of a layer's experts are used most: counted while the model is used, or before by ``llamafactory-kt stats``."""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ...checkpoint.discovery import ExpertsModule
from ...ground.errors import KTDataError, KTPathError, one_line

FILE = "stats.json"
"""of ``llamafactory-kt stats``"""


class Usage:
    """How many tokens a layer's experts got, wherever they were computed: of all rows that cost time, padding included.

    Args:
        counts: [E] int64, tokens of each expert so far.
        tokens: of which they are.
    """

    def __init__(self, counts: NDArray[np.int64], tokens: int = 0):
        self._lock = threading.Lock()
        self._counts, self.tokens = counts.copy(), tokens

    def add(self, index: torch.Tensor) -> None:
        """index [T, K] int64, on the CPU."""
        counts = np.bincount(index.reshape(-1).numpy(), minlength=len(self._counts))
        with self._lock:
            self.tokens += len(index)
            self._counts += counts

    def most_used(self, count: int) -> list[int]:
        """The numbers of so many experts; of those that are used alike, the first."""
        with self._lock:
            return [int(expert) for expert in np.argsort(-self._counts, kind="stable")[:count]]


def read_usage(path: Path | None, experts: Sequence[ExpertsModule]) -> list[Usage]:
    """The usage of each layer.

    Args:
        path: ``stats.json`` of ``llamafactory-kt stats``, or its directory; None for nothing counted so far.
        experts: the model's.

    Raises:
        KTPathError: It does not exist.
        KTDataError: It is another file, or of a model with other layers or numbers of experts.
    """
    if path is None:
        return [Usage(np.zeros(module.shape.num_experts, np.int64)) for module in experts]
    file = path / FILE if path.is_dir() else path
    try:
        layers = {entry["layer"]: _counts(entry) for entry in json.loads(file.read_text(encoding="utf-8"))["layers"]}
    except FileNotFoundError as error:
        raise KTPathError(f"kt_gpu_experts_path: {file} does not exist.") from error
    except (OSError, UnicodeError, ValueError, LookupError, TypeError, OverflowError) as error:
        raise KTDataError(
            f"kt_gpu_experts_path: {file} is not the {FILE} that llamafactory-kt stats writes ({type(error).__name__}: {one_line(error)})."
        ) from error
    found = {layer: len(counts) for layer, (counts, _) in layers.items()}
    wanted = {module.layer: module.shape.num_experts for module in experts}
    if found != wanted:
        raise KTDataError(
            f"kt_gpu_experts_path: {file} counts the experts of another model: layers and experts {found}, expected {wanted}."
        )
    return [Usage(*layers[module.layer]) for module in experts]


def _counts(entry: dict[str, Any]) -> tuple[NDArray[np.int64], int]:
    """Tokens of each expert, and of all, of one layer in the file."""
    counts = np.array(entry["counts"], np.int64)
    if counts.ndim != 1 or (counts < 0).any():
        raise ValueError(f"layer {entry['layer']} has no counts")
    return counts, int(entry["tokens"])
