"""Files whose mapped pages are weights in use, and what happens to them.

A file that is replaced (a new one takes its name, as ``git``, ``rsync``, ``huggingface_hub`` and our own commands do) or removed stays as it was
for whoever has mapped it. One that is written to in place changes the weights, and one that is cut short would end the process that reads them: it
finds zeros instead (``src/mapped.cpp``), and both are noticed before an answer goes out.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from .library import kernels


def watch(paths: Iterable[Path]) -> list[MappedFile]:
    """Watch all that this process has mapped of some files."""
    wanted = {os.path.realpath(path): path for path in paths}
    found = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        area, _, _, _, _, *name = line.split(maxsplit=5)
        if name and name[0] in wanted:
            first, last = (int(address, 16) for address in area.split("-"))
            found.append(MappedFile(wanted[name[0]], first, last - first))
    return found


class MappedFile:
    """Watches a file from now on, for as long as the object is kept.

    Args:
        path: The file.
        address: Where it is mapped, read-only.
        nbytes: So much of it.
    """

    def __init__(self, path: Path, address: int, nbytes: int):
        self._path, self._address = path, address
        self._state = _state(path)
        guarded = kernels().kt_guard_mapped(address, nbytes) == 0
        self._release = (
            kernels().kt_release_mapped if guarded else None
        )  # when Python ends, modules have no names any more

    def problem(self) -> str | None:
        """What has happened to the file that makes the weights wrong; to be asked after they have been used, before an answer is given."""
        try:
            inode, size, written = _state(self._path)
        except OSError:
            return None  # removed
        if inode != self._state[0] or (size, written) == self._state[1:]:
            return None
        how = "cut short" if size < self._state[1] else "written to"
        return f"{self._path} was {how} while its weights were in use. Restore the file, and load the model again."

    def close(self) -> None:
        """Before the mapping goes."""
        if self._release is not None:
            self._release(self._address)
            self._release = None

    __del__ = close


def _state(path: Path) -> tuple[tuple[int, int], int, int]:
    found = os.stat(path)
    return (found.st_dev, found.st_ino), found.st_size, found.st_mtime_ns
