"""Directories that appear when they are complete, so that the next run continues an interrupted one."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from ...engines.weight_files import Files, read_record, write_record, wrong_files
from ...ground.atomic_output import check_room, replacing, writing
from ...ground.errors import KTModelError


@dataclass(frozen=True)
class Part:
    """A layer's directory, or another."""

    directory: Path
    record: Any
    """a dataclass: what the directory is made from, and how"""
    nbytes: int
    write: Callable[[Path], Iterable[Path]]
    """makes the directory under this name, and returns its files"""
    files: Files = field(default_factory=dict)
    """that it must have, beside those that its record names"""

    def is_complete(self) -> bool:
        """Whether the directory is there, with all of its files.

        Raises:
            KTModelError: It holds something else.
        """
        found = read_record(self.directory, type(self.record))
        if found is None:
            return False
        if found[0] != self.record:
            has = ", ".join(f"{name} {value}" for name, value in asdict(found[0]).items() if name != "fingerprint")
            raise KTModelError(
                f"{self.directory} holds another model's or another method's weights ({has}). Choose another output, or replace it with --overwrite."
            )
        return not wrong_files(self.directory, {**found[1], **self.files})


def check_output(target: Path) -> None:
    """Check that an output is new, empty, or an earlier one.

    Raises:
        KTModelError: It holds something else.
    """
    if target.is_file():
        raise KTModelError(f"{target} is a file, and a directory is to be written; choose another output.")
    if target.is_dir() and not _parts(target) and any(not path.name.startswith(".") for path in target.iterdir()):
        raise KTModelError(f"{target} is not empty, and holds no quantized layers; choose another output.")


def _parts(target: Path) -> list[Path]:
    """The directories of all parts, also of other models and methods."""
    return [path for name in ("layer_*", "_layer_*", "dense_int*") for path in target.glob(name) if path.is_dir()]


def complete(target: Path, parts: Sequence[Part], *, overwrite: bool = False) -> list[Part]:
    """Write the parts that are missing, and return them.

    Args:
        overwrite: remove all that is there first.

    Raises:
        KTModelError: A part's directory holds something else, or the disk is too small.
        KTOutputError: A part could not be written. Those before it stay.
    """
    if overwrite:
        with writing(target):
            for directory in _parts(target):
                shutil.rmtree(directory)
    missing = [part for part in parts if not part.is_complete()]
    nbytes = sum(part.nbytes for part in missing)
    check_room(target, nbytes)
    with tqdm(
        total=nbytes, unit="B", unit_scale=True, unit_divisor=1024, desc="Quantizing", disable=None if missing else True
    ) as bar:
        for number, part in enumerate(missing, start=1):
            bar.set_postfix_str(f"{number} of {len(missing)}", refresh=True)
            with writing(target):
                if part.directory.is_dir():  # incomplete, or without our record
                    shutil.rmtree(part.directory)
            with replacing(part.directory) as temporary:
                write_record(temporary, part.record, part.write(temporary))
            bar.update(part.nbytes)
    return missing
