"""Packed expert weights on disk: kt-kernel's ``.kt`` files, and a record of what they were made from.

A directory has ``_layer_{L}/_numa_{N}/*.kt`` for each layer, as kt-kernel writes and reads them, and our ``_layer_{L}/layer.json``: method,
sizes, a fingerprint of the checkpoint's weights, and the size and SHA-256 of every file. Directories of kt-kernel's own converter have no
record; of those, only the files' sizes are checked.
"""

from __future__ import annotations

import errno
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...adapters import ExpertsShape
from ...ground.errors import KTPathError
from ..weight_files import RECORD, Files, check_checksums, check_record, check_sizes, read_record, wrong_files
from .methods import Method

logger = logging.getLogger(__name__)


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


def holds_kt_files(root: Path) -> bool:
    """Whether a directory has such files."""
    return any(root.glob("_layer_*"))


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
                f"{root} --method {method.name.lower()} makes them."
            )
        found = read_record(self._directory, LayerRecord)
        if found is None:
            self._files: Files = expected_files(record, method)
            logger.warning(
                "%s has no %s, so only the sizes of its files are checked, not whether they belong to this model.",
                self._directory, RECORD,
            )  # fmt: skip
        else:
            check_record(self._directory, found[0], record)
            self._files = found[1]
        check_sizes(self._directory, {**self._files, **expected_files(record, method)})

    def check_files(self) -> None:
        """Compare the files with their checksums, as far as there are any.

        Raises:
            KTModelError: One has changed.
        """
        check_checksums(self._directory, self._files)


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


def record_for(shape: ExpertsShape, method: Method, pools: int, fingerprint: str) -> LayerRecord:
    """The record a layer of this shape must have."""
    return LayerRecord(method.name, pools, shape.num_experts, shape.hidden_size, shape.intermediate_size, fingerprint)
