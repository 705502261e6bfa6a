"""Atomic output: files and directories are written under a temporary name, checked, and renamed when complete.

Every writer of the package is one of :func:`replacing`, :func:`writing` and :func:`temporary_directory`. A process that is killed leaves
its temporary directory behind, but not its lock on it; whoever writes beside it next removes it.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import resource
import shutil
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path

from safetensors import SafetensorError

from .errors import KTAdapterError, KTError, KTModelError, KTOutputError, first_line
from .machine import gib

_LOCK = ".llamafactory-kt"
"""name of the file in a temporary directory that its process holds a lock on"""
_TEMPORARY = re.compile(r"(\..+\.|llamafactory-kt-.+-)[a-z0-9_]{8}")
_FAILED_WRITES = re.compile(
    "|".join(re.escape(os.strerror(code)) for code in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT, errno.EIO, errno.EROFS))
    + r"|os error \d+|PytorchStreamWriter|file write failed|inline_container",
    re.IGNORECASE,
)
"""in messages of libraries that do not raise OSError: tokenizers, safetensors, torch"""


def check_free(path: Path, earlier: str | None = None) -> None:
    """Check that an output directory does not exist or is empty, before there is anything to write.

    Args:
        earlier: the name of a file by which a directory is known as an earlier output, which may go.

    Raises:
        KTAdapterError: It is not empty, or a file.
    """
    if path.is_file():
        raise KTAdapterError(f"{path} is a file, and a directory is to be written; choose another output.")
    _check_empty(path, earlier)


def check_file(path: Path) -> None:
    """Check that a file can be written under a name, before there is anything to write.

    Raises:
        KTAdapterError: The name is a directory's.
        KTOutputError: As :func:`writing`.
    """
    _check_no_directory(path)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary_directory(f".{path.name}.", path.parent):
            pass


def _check_no_directory(path: Path) -> None:
    if path.is_dir():
        raise KTAdapterError(f"{path} is a directory, and a file is to be written; choose another output.")


def _check_empty(path: Path, earlier: str | None) -> None:
    if not path.is_dir() or not any(path.iterdir()) or (earlier is not None and (path / earlier).is_file()):
        return
    if earlier is not None:
        raise KTAdapterError(
            f"{path} is not empty and holds no {earlier}: --overwrite replaces earlier outputs alone. Choose another output or remove it."
        )
    raise KTAdapterError(
        f"{path} exists and is not empty; choose another output, or let --overwrite replace what an earlier run wrote."
    )


def check_apart(output: Path, *inputs: str | Path) -> None:
    """Check that replacing an output takes away nothing that is read.

    Raises:
        KTAdapterError: It is one of the inputs, or contains one.
    """
    for given in inputs:
        if output.resolve() in (found := Path(given).expanduser().resolve(), *found.parents):
            raise KTAdapterError(f"{output} is or contains {given}, which is read; choose another output.")


def check_room(path: Path, nbytes: int) -> None:
    """Check that an output fits on its disk, before anything is written.

    Raises:
        KTModelError: It does not.
    """
    if nbytes > (free := _free(path)):
        raise KTModelError(f"{path} needs {gib(nbytes)} and {gib(free)} are free there; choose another output.")


@contextlib.contextmanager
def replacing(path: Path, earlier: str | None = None) -> Iterator[Path]:
    """A temporary name beside ``path``; its content is checked and renamed to ``path`` at the end, and removed on any error.

    Args:
        earlier: as in :func:`check_free`.

    Raises:
        KTAdapterError: ``path`` is a directory that is not empty.
        KTOutputError: As :func:`writing`.
    """
    _check_empty(path, earlier)
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary_directory(f".{path.name}.", path.parent) as directory:
            temporary = directory / path.name
            yield temporary
            for file in [temporary] if temporary.is_file() else temporary.rglob("*"):
                if file.is_file():
                    _finish(file)
            if path.is_dir():
                if temporary.is_file():
                    _check_no_directory(path)
                os.replace(path, directory / "earlier")  # which goes with this directory
            os.replace(temporary, path)


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Around what writes to ``path``.

    Raises:
        KTOutputError: It cannot be written: the disk is full, the file larger than allowed, the directory protected ... Libraries
            raise errors of many types then.
    """
    try:
        yield
    except KTError:
        raise
    except Exception as error:
        if not isinstance(error, OSError) and not _FAILED_WRITES.search(str(error)):
            raise
        raise KTOutputError(
            f"{path} could not be written ({_reason(path, error)}). Nothing incomplete is left of it; make room there, or choose another "
            "output."
        ) from error


@contextlib.contextmanager
def temporary_directory(prefix: str, parent: Path | None = None) -> Iterator[Path]:
    """A new directory, in ``parent`` or in that for temporary files, removed at the end; what killed processes left there goes before.

    Args:
        prefix: of its name: ``.NAME.`` or ``llamafactory-kt-NAME-``.
    """
    parent = parent or Path(tempfile.gettempdir())
    _sweep(parent)
    with tempfile.TemporaryDirectory(prefix=prefix, dir=parent, ignore_cleanup_errors=True) as name:
        directory = Path(name)
        with (directory / f"{_LOCK}-").open("w") as lock:
            with contextlib.suppress(OSError):  # a file system without locks: nobody will remove it
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            Path(lock.name).rename(directory / _LOCK)  # nobody finds it before it is locked
            yield directory


def _sweep(parent: Path) -> None:
    """Remove the temporary directories whose processes are gone."""
    with contextlib.suppress(OSError), os.scandir(parent) as entries:
        for directory in [Path(entry.path) for entry in entries if _TEMPORARY.fullmatch(entry.name)]:
            if _is_dead(directory):
                shutil.rmtree(directory, ignore_errors=True)


def _is_dead(directory: Path) -> bool:
    try:
        with (directory / _LOCK).open("r+") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
    except OSError:
        return False


def _finish(file: Path) -> None:
    """Check that a file is whole, wait until it is on the disk, since some file systems report only then that they could not write it, and
    give it the permissions of any new file: safetensors makes files readable by their owner only."""
    if not is_whole(file):
        raise OSError(errno.EIO, f"{file.name} is incomplete")
    with file.open("rb") as handle:
        os.fsync(handle.fileno())
    mask = os.umask(0)
    os.umask(mask)
    file.chmod(0o666 & ~mask)


def is_whole(file: Path) -> bool:
    """Whether a tensor file has all the bytes that its own directory tells of: safetensors have it at the start, torch's archives at the
    end. Files of other kinds tell nothing."""
    if file.suffix in (".pt", ".bin"):
        return zipfile.is_zipfile(file)
    if file.suffix == ".safetensors":
        from .tensors.safetensors_files import read_header  # with torch, without which commands say what is wrong

        try:
            read_header(file)
        except SafetensorError:
            return False
    return True


def _reason(path: Path, error: Exception) -> str:
    reason = (
        error.strerror
        if isinstance(error, OSError) and error.strerror
        else re.sub(r"^\[.*?\] ?\. ", "", first_line(error))
    )
    other = getattr(error, "filename", None)
    if other and Path(other).name != path.name and not str(other).startswith(str(path.parent)):
        reason = f"{reason}: {other}"
    with contextlib.suppress(OSError):
        reason += f"; {gib(_free(path))} are free on its disk"
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)[0]
    if limit != resource.RLIM_INFINITY:
        reason += f", and a file may have {gib(limit)} (ulimit -f)"
    return reason


def _free(path: Path) -> int:
    there = next(parent for parent in (path, *path.absolute().parents) if parent.is_dir())
    return shutil.disk_usage(there).free
