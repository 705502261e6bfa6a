"""Packed expert weights on disk: kt-kernel's ``.kt`` files, and a record of what they were made from.

A directory has ``_layer_{L}/_numa_{N}/*.kt`` for each layer, as kt-kernel writes and reads them, and our ``_layer_{L}/layer.json``: method,
sizes, a fingerprint of the checkpoint's weights, and the size and SHA-256 of every file. Directories of kt-kernel's own converter have no
record; of those, only the files' sizes are checked.
"""

from __future__ import annotations

import errno
import json
import logging
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ...adapters import ExpertsShape
from ...ground.errors import KTModelError, KTPathError, name_some
from ...ground.file_hash import file_sha256
from .methods import Method

logger = logging.getLogger(__name__)

RECORD = "layer.json"


@dataclass(frozen=True)
class LayerRecord:
    """What one layer's files must be."""

    method: str
    pools: int
    """NUMA sub-pools the weights are divided into"""
    num_experts: int
    hidden_size: int
    intermediate_size: int
    fingerprint: str
    """of the checkpoint's weights, see ``LayerTensors.fingerprint``"""


def layer_directory(root: Path, layer: int) -> Path:
    return root / f"_layer_{layer}"


def check_written(directory: Path, record: LayerRecord, method: Method) -> None:
    """Check a layer's directory that kt-kernel has written.

    Raises:
        OSError: Its files are not complete. kt-kernel says nothing of it when it cannot write.
    """
    expected = expected_files(record, method)
    if wrong := wrong_files(directory, expected):
        raise OSError(errno.EIO, f"{len(wrong)} of {len(expected)} files are incomplete, first {wrong[0]}")


def write_record(directory: Path, record: LayerRecord) -> None:
    """Describe a layer's directory, whose ``.kt`` files are complete."""
    files = {str(file.relative_to(directory)): _facts(file) for file in sorted(directory.glob("_numa_*/*.kt"))}
    (directory / RECORD).write_text(json.dumps({**asdict(record), "files": files}, indent=1), encoding="utf-8")


def _facts(file: Path) -> dict[str, Any]:
    return {"size": file.stat().st_size, "sha256": file_sha256(file)}


def read_record(directory: Path) -> tuple[LayerRecord, dict[str, dict[str, Any]]] | None:
    """A layer's record and its files' sizes and checksums; None where there is none.

    Raises:
        KTModelError: It is damaged.
    """
    path = directory / RECORD
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        files = content.pop("files")
        if not all(isinstance(facts["size"], int) and isinstance(facts["sha256"], str) for facts in files.values()):
            raise ValueError("files must have size and sha256")
        return LayerRecord(**content), files
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise KTModelError(f"{path} is damaged ({error}); remove {directory} and quantize again.") from error


class PackedLayer:
    """One layer's packed weights.

    Args:
        root: the directory of all layers (``kt_weight_path``).
        record: what they must be for this model.

    Raises:
        KTPathError: The layer is not there.
        KTModelError: It was made for another method, other sizes, another number of sub-pools, or another model; or
            files are missing or have other sizes.
    """

    def __init__(self, root: Path, layer: int, record: LayerRecord, method: Method):
        self.root = root
        self._directory = layer_directory(root, layer)
        if not any(self._directory.glob("_numa_*/*.kt")):
            raise KTPathError(
                f"kt_weight_path: {root} holds no .kt files of layer {layer}. llamafactory-kt quantize --model MODEL --output "
                f"{root} --method {method.short.lower()} makes them."
            )
        found = read_record(self._directory)
        if found is None:
            self._files = expected_files(record, method)
            logger.warning(
                "%s has no %s, so only the sizes of its files are checked, not whether they belong to this model.",
                self._directory, RECORD,
            )  # fmt: skip
        else:
            self._compare(found[0], record)
            self._files = found[1]
        if wrong := wrong_files(self._directory, {**self._files, **expected_files(record, method)}):
            raise KTModelError(
                f"{self._directory}: {len(wrong)} of {len(self._files)} files are missing, truncated or of another size, first "
                f"{name_some(wrong, 2)}. Remove the layer's directory and quantize again."
            )

    def _compare(self, found: LayerRecord, wanted: LayerRecord) -> None:
        differs = [
            f"{name} {value}, wanted {getattr(wanted, name)}"
            for name, value in asdict(found).items()
            if name != "fingerprint" and value != getattr(wanted, name)
        ]
        if differs:
            raise KTModelError(
                f"{self._directory} was made with {'; '.join(differs)}. Quantize the model for this use."
            )
        if found.fingerprint != wanted.fingerprint:
            raise KTModelError(
                f"{self._directory} was made from other weights than the checkpoint's, although the sizes are the same: "
                "another model, or another version of it. Quantize this one."
            )

    def check_files(self) -> None:
        """Compare the files with their checksums, as far as there are any.

        Raises:
            KTModelError: One has changed.
        """
        for name, facts in self._files.items():
            if "sha256" in facts and file_sha256(self._directory / name) != facts["sha256"]:
                raise KTModelError(
                    f"{self._directory / name} has changed since it was made (its SHA-256 differs). Remove {self._directory} and "
                    "quantize again."
                )


def expected_files(record: LayerRecord, method: Method) -> dict[str, dict[str, Any]]:
    """kt-kernel's own names, which carry the sizes: ``INT8_gate_0_4096Byte_quant_.kt``."""
    hidden = method.padded(record.hidden_size)
    share = method.padded(record.intermediate_size, record.pools) // record.pools
    files: dict[str, dict[str, Any]] = {}
    for pool in range(record.pools):
        for projection, rows, columns in (("gate", share, hidden), ("up", share, hidden), ("down", hidden, share)):
            sizes = {"quant": rows * columns * method.bits // 8, "scale": 4 * rows}
            for expert in range(record.num_experts):
                for part, size in sizes.items():
                    name = f"{method.short}_{projection}_{expert}_{size}Byte_{part}_.kt"
                    files[f"_numa_{pool}/{name}"] = {"size": size}
    return files


def wrong_files(directory: Path, expected: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Those that are missing or of another size."""
    return [name for name, facts in expected.items() if _size(directory / name) != facts["size"]]


def _size(file: Path) -> int:
    return file.stat().st_size if file.is_file() else -1


def record_for(shape: ExpertsShape, method: Method, pools: int, fingerprint: str) -> LayerRecord:
    """The record a layer of this shape must have."""
    return LayerRecord(method.name, pools, shape.num_experts, shape.hidden_size, shape.intermediate_size, fingerprint)


def missing_layers(root: Path, records: dict[int, LayerRecord], method: Method) -> Iterable[int]:
    """The layers that a directory does not hold yet as they must be; files may be incomplete."""
    for layer, record in records.items():
        directory = layer_directory(root, layer)
        found = read_record(directory)
        if (
            found is None
            or found[0] != record
            or wrong_files(directory, {**found[1], **expected_files(record, method)})
        ):
            yield layer
