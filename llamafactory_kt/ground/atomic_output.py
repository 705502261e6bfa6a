"""Atomic output: files and directories are written under a temporary name and renamed when complete."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from .errors import KTAdapterError


def check_free(path: Path) -> None:
    """Check that an output directory does not exist or is empty.

    Raises:
        KTAdapterError: It is not empty.
    """
    if path.is_dir() and any(path.iterdir()):
        raise KTAdapterError(f"{path} exists and is not empty; choose another output or remove it.")


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary name beside ``path``; renamed to ``path`` at the end, removed on any error.

    Raises:
        KTAdapterError: ``path`` is a directory that is not empty.
    """
    check_free(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent, ignore_cleanup_errors=True) as directory:
        temporary = Path(directory) / path.name
        yield temporary
        _set_default_permissions(temporary)
        if path.is_dir():
            path.rmdir()
        os.replace(temporary, path)


def _set_default_permissions(path: Path) -> None:
    """Give files the permissions of any new file; safetensors makes them readable by their owner only."""
    mask = os.umask(0)
    os.umask(mask)
    for file in [path] if path.is_file() else path.rglob("*"):
        if file.is_file():  # a directory needs its x permission
            file.chmod(0o666 & ~mask)
