"""Output under a temporary name that is renamed when all is there, so that no part stays behind."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from .errors import KTAdapterError


def check_free(path: Path) -> None:
    """Check that an output directory is not there yet, or empty.

    Raises:
        KTAdapterError: It is not empty.
    """
    if path.is_dir() and any(path.iterdir()):
        raise KTAdapterError(f"{path} exists and is not empty; choose another output or remove it.")


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A temporary name beside ``path``; renamed to it at the end, removed on any error.

    Raises:
        KTAdapterError: ``path`` is a directory that is not empty.
    """
    check_free(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        yield temporary / path.name
        _share(temporary / path.name)
        if path.is_dir():
            path.rmdir()
        os.replace(temporary / path.name, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _share(path: Path) -> None:
    """Give files the permissions of any new file; safetensors makes them readable by their owner only."""
    mask = os.umask(0)
    os.umask(mask)
    for file in [path] if path.is_file() else path.rglob("*"):
        if file.is_file():  # a directory without x could not be entered any more
            file.chmod(0o666 & ~mask)
