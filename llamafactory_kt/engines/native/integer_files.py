"""Integers of this package on disk (``llamafactory-kt quantize --method int8``, ``int4``): what the engine would make of the checkpoint while it
loads, bit for bit.

A directory has ``layer_{L}/weights.safetensors`` for each layer's experts, one tensor ``experts``, uint8 [E, bytes], in whose rows the engine
computes (:mod:`...native.packed_block`); perhaps ``dense_int8/weights.safetensors`` or ``dense_int4/…`` with a tensor uint8 [bytes] for each
weight around the experts, by its name in the checkpoint; and ``layer.json`` beside each file (:mod:`..weight_files`).
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

import torch

from ...adapters import ExpertsShape
from ...checkpoint.stored import StoredTensor, fingerprint, stored_tensors
from ...ground.errors import KTModelError, KTPathError
from ...ground.tensors.safetensors_files import open_mapped, read_tensor
from ...ground.tensors.writer import write_safetensors
from ...native.packed import GROUP, PackedExpert, Packing
from ...native.packed_block import block_nbytes, weights_in
from ..weight_files import RECORD, check_checksums, check_record, check_sizes, read_record

WEIGHTS = "weights.safetensors"
EXPERTS = "experts"
"""name of a layer's tensor"""


@dataclass(frozen=True)
class ExpertsRecord:
    """What one layer's file must be."""

    method: str
    """the engine's name"""
    num_experts: int
    hidden_size: int
    intermediate_size: int
    has_gate: bool
    fingerprint: str
    """of the checkpoint's weights, see ``LayerTensors.fingerprint``"""
    group: int = GROUP
    """values that share a scale"""
    version: int = 1
    """of the files' format"""

    @classmethod
    def of(cls, method: str, shape: ExpertsShape, fingerprint: str) -> ExpertsRecord:
        return cls(method, shape.num_experts, shape.hidden_size, shape.intermediate_size, shape.has_gate, fingerprint)


@dataclass(frozen=True)
class DenseRecord:
    """What the file with the weights around the experts must be."""

    method: str
    """``int8`` or ``int4``, as ``kt_dense`` spells them"""
    fingerprint: str
    """of the checkpoint's weights of these names"""
    group: int = GROUP
    version: int = 1


R = TypeVar("R", ExpertsRecord, DenseRecord)


def holds_integers(root: Path) -> bool:
    """Whether a directory has such files."""
    return any(root.glob(f"layer_*/{RECORD}"))


def layer_directory(root: Path, layer: int) -> Path:
    return root / f"layer_{layer}"


def dense_directory(root: Path, bits: int) -> Path:
    return root / f"dense_int{bits}"


def expert_shapes(shape: ExpertsShape) -> list[tuple[int, int]]:
    """[out, in] of an expert's weights."""
    return [shape.projection(name) for name in PackedExpert._fields]


def layer_size(shape: ExpertsShape, packing: Packing) -> tuple[int, int]:
    """Of a layer's block: experts, and bytes of one."""
    return shape.num_experts, block_nbytes(packing, expert_shapes(shape))


def experts_in(blocks: Iterable[torch.Tensor], shape: ExpertsShape, packing: Packing) -> Iterator[PackedExpert]:
    """The experts of a layer's block, as views."""
    return (PackedExpert(*weights_in(block, packing, expert_shapes(shape))) for block in blocks)


def dense_size(tensor: StoredTensor, packing: Packing) -> tuple[int]:
    """Of the block of a weight [out, in] of the checkpoint."""
    rows, cols = tensor.shape
    return (block_nbytes(packing, [(rows, cols)]),)


class IntegersFile(Generic[R]):
    """One directory's file.

    Args:
        kind: of its record.

    Raises:
        KTModelError: It is missing, cut, damaged, or of another version.
    """

    def __init__(self, directory: Path, kind: type[R]):
        found = read_record(directory, kind)
        assert found is not None, f"{directory} has no record"
        self._directory, self._path = directory, directory / WEIGHTS
        self._record: R = found[0]
        self._files = found[1]
        check_sizes(directory, {WEIGHTS: {"size": None}, **self._files})
        self.blocks = {tensor.name: tensor.shape for tensor in stored_tensors(self._path)}
        """its tensors, and their shapes"""

    def check(self, record: R, blocks: Mapping[str, tuple[int, ...]]) -> None:
        """Compare it with what it must be.

        Raises:
            KTModelError: It was made with another method or sizes, or from another model.
        """
        check_record(self._directory, self._record, record)
        if self.blocks != blocks:
            raise KTModelError(
                f"{self._path} has other tensors than its record tells. Remove {self._directory} and quantize again."
            )

    def read(self) -> dict[str, torch.Tensor]:
        """The blocks, mapped.

        Raises:
            KTModelError: The file has changed since it was made.
        """
        check_checksums(self._directory, self._files)
        handle = open_mapped(self._path)
        return {name: read_tensor(handle, name) for name in self.blocks}


def open_experts(
    root: Path, layer: int, shape: ExpertsShape, packing: Packing, record: ExpertsRecord
) -> IntegersFile[ExpertsRecord]:
    """One layer's file.

    Raises:
        KTPathError: There is none.
        KTModelError: As :class:`IntegersFile`.
    """
    directory = layer_directory(root, layer)
    if not (directory / RECORD).is_file():
        others = any(root.glob("_layer_*"))
        raise KTPathError(
            f"kt_weight_path: {root} holds no integers of layer {layer}"
            f"{f', but .kt files, which are for kt_backend: AMX{record.method}' if others else ''}. llamafactory-kt quantize --model MODEL "
            f"--output {root} --method {record.method.lower()} makes them."
        )
    file = IntegersFile(directory, ExpertsRecord)
    file.check(record, {EXPERTS: layer_size(shape, packing)})
    return file


def open_dense(root: Path, packing: Packing, checkpoint: Iterable[StoredTensor]) -> IntegersFile[DenseRecord] | None:
    """The file of the weights around the experts; None where it was not wanted.

    Args:
        checkpoint: the tensors that it may be made from.

    Raises:
        KTModelError: As :class:`IntegersFile`.
    """
    directory = dense_directory(root, packing.bits)
    if not (directory / RECORD).is_file():
        return None
    file = IntegersFile(directory, DenseRecord)
    own = [tensor for tensor in checkpoint if tensor.name in file.blocks]
    file.check(dense_record(own, packing), {tensor.name: dense_size(tensor, packing) for tensor in own})
    return file


def dense_record(weights: Iterable[StoredTensor], packing: Packing) -> DenseRecord:
    """What a file with these weights must be."""
    return DenseRecord(packing.kind, fingerprint(weights))


def write_blocks(directory: Path, names: Collection[str], blocks: Iterable[tuple[str, torch.Tensor]]) -> list[Path]:
    """Write a directory's file, block by block; its record comes afterwards."""
    directory.mkdir()
    write_safetensors(directory / WEIGHTS, names, blocks, None)
    return [directory / WEIGHTS]
