"""Adapters in the form a server takes, made once and kept: a directory a content, outside of any checkpoint.

``<cache>/adapters/<key>/`` holds what was made and ``entry.json``. It appears when it is complete. The key is a hash of
the adapter's files, of the experts' sizes and of the form, so that a changed adapter is another entry.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from ..adapters import Adapter, ExpertsShape
from ..ground.atomic_output import replacing
from ..ground.errors import KTPathError
from ..ground.machine import cache_directory

ENTRY = "entry.json"
VERSION = 1
"""of the forms that are written; a change makes all entries anew"""


@dataclass(frozen=True)
class Entry:
    """One prepared adapter."""

    path: Path
    source: str
    form: str
    created: float
    """seconds since 1970"""
    files: dict[str, int]
    """name below ``path`` -> bytes"""

    @property
    def nbytes(self) -> int:
        return sum(self.files.values())

    @property
    def complete(self) -> bool:
        """Whether all files are there with their sizes."""
        return all((self.path / n).is_file() and (self.path / n).stat().st_size == s for n, s in self.files.items())

    @property
    def source_exists(self) -> bool:
        return Path(self.source).exists()


def prepared(
    adapter: Adapter, form: str, shapes: Mapping[int, ExpertsShape] | None, make: Callable[[Path], None]
) -> Entry:
    """The entry of an adapter; made if it is not there. Processes that want the same one wait for each other.

    Args:
        adapter: what to prepare.
        form: what is made of it, as a name.
        shapes: the model's experts per layer, which decide what is written beside the adapter's own.
        make: writes the form's files into the directory it is given.

    Raises:
        KTAdapterError: What ``make`` raises. Nothing is left behind.
        KTPathError: The cache cannot be written.
    """
    root = cache_directory() / "adapters"
    path = root / _key(adapter, form, shapes)
    with _locked(root):
        entry = _read(path)
        if entry is not None and entry.complete:
            return entry
        shutil.rmtree(path, ignore_errors=True)  # damaged
        with replacing(path) as temporary:
            temporary.mkdir()
            make(temporary)
            made = sorted(file for file in temporary.rglob("*") if file.is_file())
            files = {str(file.relative_to(temporary)): file.stat().st_size for file in made}
            entry = Entry(path, str(adapter.directory.resolve()), form, time.time(), files)
            text = json.dumps({**asdict(entry), "path": str(path)}, indent=2)
            (temporary / ENTRY).write_text(text, encoding="utf-8")
    return entry


def entries() -> list[Entry]:
    """All entries, the oldest first."""
    root = cache_directory() / "adapters"
    found = [_read(path) for path in sorted(root.iterdir())] if root.is_dir() else []
    return sorted((entry for entry in found if entry is not None), key=lambda entry: entry.created)


def clean(keep: Callable[[Entry], bool] = lambda entry: False) -> list[Entry]:
    """Remove the entries that ``keep`` does not want, and what half-finished runs left behind; returns what was removed."""
    root, removed = cache_directory() / "adapters", []
    with _locked(root):
        for path in [path for path in sorted(root.iterdir()) if path.is_dir()]:
            entry = _read(path)
            if entry is None or not keep(entry):
                shutil.rmtree(path, ignore_errors=True)
                removed += [entry] if entry is not None else []
    return removed


def _read(path: Path) -> Entry | None:
    try:
        raw = json.loads((path / ENTRY).read_text(encoding="utf-8"))
        return Entry(path, raw["source"], raw["form"], raw["created"], raw["files"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _key(adapter: Adapter, form: str, shapes: Mapping[int, ExpertsShape] | None) -> str:
    sizes = {str(layer): asdict(shape) for layer, shape in sorted((shapes or {}).items())}
    digest = hashlib.sha256(json.dumps([VERSION, form, sizes], sort_keys=True).encode())
    for file in _files(adapter):
        with file.open("rb") as handle:
            digest.update(f"{file.name}\0".encode() + hashlib.file_digest(handle, "sha256").digest())
    return digest.hexdigest()[:24]


def _files(adapter: Adapter) -> list[Path]:
    """The files an adapter is read from: its tensors and its configuration."""
    files = {info.file for info in adapter.store.infos.values()} | {adapter.settings.path}
    return sorted(file for file in files if file.is_file())


@contextmanager
def _locked(root: Path) -> Iterator[None]:
    try:
        root.mkdir(parents=True, exist_ok=True)
        handle = (root / ".lock").open("w")
    except OSError as error:
        raise KTPathError(
            f"{root}, where adapters are prepared for SGLang, cannot be written ({error.strerror}); name another directory "
            "in LLAMAFACTORY_KT_CACHE."
        ) from error
    with handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
