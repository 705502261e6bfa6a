"""Files of the source tree that travel with the package: hatch_build.py puts them into wheels."""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).parents[1]


def travelling(path: str) -> Path:
    """Where a file or folder of the source tree is: in the package, or for editable installs where it always was.

    Args:
        path: in the source tree.
    """
    inside, source = _PACKAGE / "travelling" / path, _PACKAGE.parent / path
    return inside if inside.exists() or not source.exists() else source
