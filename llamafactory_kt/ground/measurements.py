"""What was measured on this machine, kept for later loads in files below the cache directory.

A file is ignored where anything that its measurements depend on has changed, and where it is damaged.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from .atomic_output import replacing
from .machine import cache_directory, cpu_name, numa_nodes, usable_cores

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Remembered:
    """The place of one measurement.

    Args:
        facts: what it depends on, beside the machine and the packages' versions; as JSON has it.
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
        """Another one for each set of facts."""
        name = hashlib.sha256(json.dumps(self._every).encode()).hexdigest()[:16]
        return cache_directory() / "calibration" / f"{name}.json"

    def recall(self) -> Any:
        """What was kept, or None."""
        try:
            content = json.loads(self.file.read_text())
            return content["measured"] if content["facts"] == self._every else None
        except (OSError, ValueError, TypeError, KeyError):
            return None

    def keep(self, measured: Any) -> None:
        """In place of what was kept; if that fails, the log says so.

        Args:
            measured: as JSON has it.
        """
        try:
            with replacing(self.file) as temporary:
                temporary.write_text(json.dumps({"facts": self._every, "measured": measured}, indent=1))
        except OSError as error:
            logger.warning(
                "What was measured could not be kept in %s (%s); the next load measures again.", self.file, error
            )

    def forget(self) -> None:
        """Have it measured again."""
        with contextlib.suppress(OSError):
            self.file.unlink()


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return ""
