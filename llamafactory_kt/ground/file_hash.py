"""What tells whether a file is the one that a record describes."""

from __future__ import annotations

import hashlib
from pathlib import Path


def file_sha256(file: Path) -> str:
    """The file's SHA-256, in hexadecimal."""
    with file.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def file_versions(directory: Path, *more: Path) -> tuple[tuple[str, int, int], ...]:
    """(path, bytes, time of the last change) of the files of a directory, and of more files."""
    files = {file.resolve() for file in (*directory.iterdir(), *more) if file.is_file()}
    return tuple((str(file), (found := file.stat()).st_size, found.st_mtime_ns) for file in sorted(files))
