"""Directories of weights that were made for an engine before a load, each with a record of what they were made from: ``layer.json``.

A record has what the weights are (a dataclass of the engine's), and the size and SHA-256 of each file. A checksum costs a pass over the
file, so it is compared only where the file is not the very one that was written: by inode and time of the last change, as git knows the
files of its index.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from ..ground.errors import KTModelError, name_some
from ..ground.file_hash import file_sha256

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

R = TypeVar("R", bound="DataclassInstance")

RECORD = "layer.json"

Files = Mapping[str, Mapping[str, Any]]
"""name, relative to the directory -> its size and, of recorded ones, SHA-256"""


def write_record(directory: Path, record: DataclassInstance, files: Iterable[Path]) -> None:
    """Describe a directory whose files are complete."""
    facts = {str(file.relative_to(directory)): _facts(file) for file in sorted(files)}
    (directory / RECORD).write_text(json.dumps({**asdict(record), "files": facts}, indent=1), encoding="utf-8")


def _facts(file: Path) -> dict[str, Any]:
    return {"size": file.stat().st_size, "sha256": file_sha256(file), **_identity(file)}


def _identity(file: Path) -> dict[str, int]:
    """What a copy of the file, or the file after a change, has not."""
    found = file.stat()
    return {"inode": found.st_ino, "changed": found.st_mtime_ns}


def read_record(directory: Path, kind: type[R]) -> tuple[R, Files] | None:
    """A directory's record and its files; None where there is none.

    Args:
        kind: of the record. If it has a ``version``, others are refused.

    Raises:
        KTModelError: It is damaged, or of another version.
    """
    path = directory / RECORD
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        files, version = content.pop("files"), content.get("version")
        if not all(isinstance(facts["size"], int) and isinstance(facts["sha256"], str) for facts in files.values()):
            raise ValueError("files must have size and sha256")
        found = kind(**content) if version == (known := getattr(kind, "version", None)) else None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise KTModelError(f"{path} is damaged ({error}); remove {directory} and quantize again.") from error
    if found is None:
        raise KTModelError(
            f"{path} is of version {version} of these files, and this package reads version {known}. Remove {directory} and quantize again."
        )
    return found, files


def check_record(directory: Path, found: R, wanted: R) -> None:
    """Compare what a directory holds with what it must hold.

    Raises:
        KTModelError: It was made in another way, or from other weights.
    """
    differs = [
        f"{name} {value}, wanted {getattr(wanted, name)}"
        for name, value in asdict(found).items()
        if name != "fingerprint" and value != getattr(wanted, name)
    ]
    if differs:
        raise KTModelError(f"{directory} was made with {'; '.join(differs)}. Quantize the model for this use.")
    if found != wanted:
        raise KTModelError(
            f"{directory} was made from other weights than the checkpoint's, although the sizes are the same: another model, or another "
            "version of it. Quantize this one."
        )


def check_sizes(directory: Path, files: Files) -> None:
    """Check that all files are there and whole.

    Raises:
        KTModelError: Some are not.
    """
    if wrong := wrong_files(directory, files):
        raise KTModelError(
            f"{directory}: {len(wrong)} of {len(files)} files are missing, truncated or of another size, first {name_some(wrong, 2)}. Remove "
            "the layer's directory and quantize again."
        )


def wrong_files(directory: Path, expected: Files) -> list[str]:
    """Those that are missing or of another size."""
    return [name for name, facts in expected.items() if _size(directory / name) != facts["size"]]


def _size(file: Path) -> int:
    return file.stat().st_size if file.is_file() else -1


def check_checksums(directory: Path, files: Files) -> None:
    """Compare the files with their checksums, as far as there are any and the files are not the very ones that were written.

    Raises:
        KTModelError: One has changed.
    """
    for name, facts in files.items():
        file = directory / name
        if "sha256" not in facts or _identity(file).items() <= facts.items():
            continue
        if file_sha256(file) != facts["sha256"]:
            raise KTModelError(
                f"{file} has changed since it was made (its SHA-256 differs). Remove {directory} and quantize again."
            )
