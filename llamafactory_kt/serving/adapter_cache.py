"""A cache of adapters in the form that a server takes, outside of any checkpoint.

``<cache>/adapters/<key>/`` holds the prepared files and ``entry.json``; the directory appears once it is complete. The key
hashes the adapter's files, the experts' sizes and the form, so a changed adapter gets another entry.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from ..adapters import Adapter, ExpertsShape
from ..ground.atomic_output import replacing
from ..ground.errors import KTPathError
from ..ground.file_hash import file_sha256
from ..ground.machine import cache_directory, gib, private_cache

logger = logging.getLogger(__name__)

_DIRECTORY, ENTRY = "adapters", "entry.json"
VERSION = 1
"""version of the written forms; a change invalidates all entries"""


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
        """Whether every file exists and has its size."""
        return all((self.path / n).is_file() and (self.path / n).stat().st_size == s for n, s in self.files.items())

    @property
    def source_exists(self) -> bool:
        return Path(self.source).exists()


def prepared(
    adapter: Adapter, form: str, shapes: Mapping[int, ExpertsShape] | None, make: Callable[[Path], None]
) -> Path:
    """The directory of the prepared adapter, made if there is none. Processes that want the same one wait for each other.

    Args:
        adapter: what to prepare.
        form: the name of the target form.
        shapes: the model's experts per layer; the layers decide which zeros are written beside the adapter's own tensors.
        make: writes the files into the directory that it is given.

    Raises:
        KTAdapterError: A tensor has a NaN or Inf, or ``make`` raised it; nothing is left behind.
        KTPathError: The cache cannot be written.
    """
    root = _root()
    path = root / _key(adapter, form, shapes)
    with _locked(root):
        entry = _read(path)
        if entry is None or not entry.complete:
            logger.info("Preparing %s for SGLang (%s)", adapter.directory, form)
            _remove(path)
            with replacing(path) as temporary:
                temporary.mkdir()
                adapter.check_finite(adapter.other_names)
                make(temporary)
                made = sorted(file for file in temporary.rglob("*") if file.is_file())
                files = {str(file.relative_to(temporary)): file.stat().st_size for file in made}
                entry = Entry(path, str(adapter.directory.resolve()), form, time.time(), files)
                text = json.dumps({**asdict(entry), "path": str(path)}, indent=2)
                (temporary / ENTRY).write_text(text, encoding="utf-8")
    logger.info("SGLang gets the adapter %s from %s (%s, %s)", adapter.directory, path, form, gib(entry.nbytes))
    return path


def entries() -> list[Entry]:
    """All entries, the oldest first."""
    found = map(_read, _root().iterdir()) if _root().is_dir() else ()
    return sorted((entry for entry in found if entry is not None), key=lambda entry: entry.created)


def clean(keep: Callable[[Entry], bool] = lambda entry: False) -> list[Entry]:
    """Remove and return the entries for which ``keep`` is false; also remove what interrupted runs left behind."""
    root, removed = _root(), []
    with _locked(root):
        for path in [path for path in sorted(root.iterdir()) if path.is_dir()]:
            entry = _read(path)
            if entry is None or not keep(entry):
                _remove(path)
                removed += [entry] if entry is not None else []
    return removed


def _remove(path: Path) -> None:
    """Remove an entry, or what is in its place, damaged or somebody else's."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _root() -> Path:
    return cache_directory() / _DIRECTORY


def _read(path: Path) -> Entry | None:
    try:
        raw = json.loads((path / ENTRY).read_text(encoding="utf-8"))
        entry = Entry(path, str(raw["source"]), str(raw["form"]), float(raw["created"]), dict(raw["files"]))
        return entry if all(isinstance(size, int) for size in entry.files.values()) else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def _key(adapter: Adapter, form: str, shapes: Mapping[int, ExpertsShape] | None) -> str:
    sizes = {str(layer): asdict(shape) for layer, shape in sorted((shapes or {}).items())}
    digest = hashlib.sha256(json.dumps([VERSION, form, sizes], sort_keys=True).encode())
    files = {info.file for info in adapter.store.infos.values()} | {adapter.settings.path}
    for file in sorted(file for file in files if file.is_file()):
        digest.update(f"{file.name}\0{file_sha256(file)}".encode())
    return digest.hexdigest()[:24]


@contextmanager
def _locked(root: Path) -> Iterator[None]:
    try:
        private_cache(_DIRECTORY)
        handle = (root / ".lock").open("w")
    except OSError as error:
        raise KTPathError(
            f"{root}, where adapters are prepared for SGLang, cannot be written ({error.strerror}); name another directory "
            "in LLAMAFACTORY_KT_CACHE."
        ) from error
    with handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
