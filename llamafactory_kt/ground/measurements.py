"""Measurements on this machine, kept for later loads in files below the cache directory.

A file is ignored if it is damaged, or if anything that its measurement depends on has changed.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

from .atomic_output import replacing
from .errors import KTError, one_line
from .machine import cache_directory, cpu_name, numa_nodes, private_cache, usable_cores

logger = logging.getLogger(__name__)

_DIRECTORY = "calibration"
BUSY = 0.5
"""tasks that run or wait, for each core, before anything is measured: with more, the figures are not the machine's"""
Measured = TypeVar("Measured")


def load_of_cores() -> float:
    """Tasks that have run or waited in the last minute, for each core that this process may use."""
    return os.getloadavg()[0] / usable_cores()


@dataclass(frozen=True)
class Remembered:
    """One measurement that is kept.

    Args:
        facts: what it depends on besides the machine and the packages' versions; JSON values.
    """

    facts: dict[str, Any]

    @property
    def _every(self) -> dict[str, Any]:
        return {
            "machine": [cpu_name(), usable_cores(), len(numa_nodes()), os.environ.get("OMP_NUM_THREADS")],
            "versions": [_version(name) for name in ("llamafactory-kt-experts", "torch", "kt-kernel")],
            **self.facts,
        }

    @property
    def file(self) -> Path:
        """Each set of facts has a file of its own."""
        name = hashlib.sha256(json.dumps(self._every).encode()).hexdigest()[:16]
        return cache_directory() / _DIRECTORY / f"{name}.json"

    def recall(self, read: Callable[[Any], Measured]) -> Measured | None:
        """The measurement, or None if there is none for these facts; warns of a file that is not one.

        Args:
            read: makes the measurement of JSON values; may raise anything of what is none.
        """
        try:
            text = self.file.read_text()
        except (OSError, UnicodeDecodeError):
            return None
        try:
            content = json.loads(text)
            if content["facts"] != self._every:
                raise ValueError("of something else")
            return read(content["measured"])
        except (ValueError, TypeError, LookupError, ArithmeticError, AttributeError, RecursionError):
            logger.warning("%s holds no measured times, or is damaged; it is ignored and written again.", self.file)
            return None

    def keep(self, measured: Any) -> None:
        """Keep a measurement (JSON values) in place of an earlier one; warn if it cannot be written."""
        try:
            private_cache(_DIRECTORY)
            with replacing(self.file) as temporary:
                temporary.write_text(json.dumps({"facts": self._every, "measured": measured}, indent=1))
        except (OSError, KTError) as error:
            logger.warning(
                "The measured times could not be kept in %s (%s); the next load measures again.",
                self.file,
                one_line(error),
            )

    def forget(self) -> None:
        """Remove the measurement, so that the next load measures again."""
        with contextlib.suppress(OSError):
            self.file.unlink()


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""
