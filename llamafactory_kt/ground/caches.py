"""Directories of the cache, which only their user may enter: adapters are in them, and names of files."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from .machine import cache_directory


def private_cache(name: str) -> Path:
    """The cache's directory of this name, made if there is none, with the permissions 0700.

    Raises:
        OSError: It cannot be made.
    """
    root = cache_directory()
    root.mkdir(mode=0o700, parents=True, exist_ok=True)
    directory = root / name
    directory.mkdir(mode=0o700, exist_ok=True)
    with contextlib.suppress(OSError):  # somebody else's; an earlier version made them as the umask was
        if directory.stat().st_mode & 0o077 and directory.stat().st_uid == os.geteuid():
            directory.chmod(0o700)
    return directory
