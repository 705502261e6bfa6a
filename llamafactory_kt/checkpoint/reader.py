"""Reading one layer's expert tensors from a checkpoint. FP8 weights are dequantized on the way."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cache
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open

from ..adapters import ExpertLora, ExpertsShape
from ..adapters.keys import PROJECTIONS
from ..ground.paging import drop_pages, in_huge_pages, prefetch_pages
from .discovery import ExpertsModule
from .fp8 import FP8, Block, dequantize

SIZES = {"F32": 4, "F16": 2, "BF16": 2, FP8: 1}
"""bytes per element of each dtype that experts may be stored in, by safetensors' names"""
_TORCH = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, FP8: torch.bfloat16}
"""dtype in memory if no conversion is asked for; for FP8 as LLaMA-Factory dequantizes it"""


FUSED = ("gate_up_proj", "down_proj")
Piece = tuple[str, int | None]
"""of a layer's experts: (projection, expert), or (one of :data:`FUSED`, None)"""


class ExpertWeights(NamedTuple):
    """One expert's weights: gate and up [I, H], down [H, I], on the CPU."""

    gate: torch.Tensor
    up: torch.Tensor
    down: torch.Tensor


@dataclass
class LayerWeights:
    """One layer's expert weights: gate and up [E, I, H], down [E, H, I], on the CPU."""

    gate: torch.Tensor
    up: torch.Tensor
    down: torch.Tensor

    @classmethod
    def stacked(
        cls, experts: Iterable[ExpertWeights], shape: ExpertsShape, dtype: torch.dtype, padded: tuple[int, int]
    ) -> LayerWeights:
        """Copy the experts into stacked tensors.

        Args:
            padded: hidden and intermediate size of the result; the padding is zeros.
        """
        hidden, intermediate = padded
        make = torch.empty if padded == (shape.hidden_size, shape.intermediate_size) else torch.zeros
        sizes = (intermediate, hidden), (intermediate, hidden), (hidden, intermediate)
        stacks = [in_huge_pages(make(shape.num_experts, *size, dtype=dtype, device="cpu")) for size in sizes]
        for number, expert in enumerate(experts):
            for stack, matrix in zip(stacks, expert, strict=True):
                stack[number, : matrix.shape[0], : matrix.shape[1]].copy_(matrix)
        return cls(*stacks)


@dataclass
class StoredTensor:
    """A checkpoint tensor, or the scales of one."""

    name: str
    file: Path
    shape: tuple[int, ...]
    dtype: str
    """safetensors' name"""
    scale: StoredTensor | None = None
    """of an FP8 weight"""


@dataclass
class LayerTensors:
    """The tensors of one module's experts."""

    module: ExpertsModule
    block: Block | None
    """of an FP8 checkpoint, else None"""
    stored: dict[Piece, StoredTensor] = field(default_factory=dict)
    """the weights; :meth:`tensors` are their scales too"""

    @property
    def fused(self) -> bool:
        return any(expert is None for _, expert in self.stored)

    def tensors(self) -> list[StoredTensor]:
        """Weights and their scales."""
        weights = list(self.stored.values())
        return weights + [weight.scale for weight in weights if weight.scale is not None]

    @property
    def nbytes(self) -> int:
        """On disk."""
        return sum(prod(tensor.shape) * SIZES[tensor.dtype] for tensor in self.tensors())

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights, or bfloat16 for FP8; float32 where they differ."""
        stored = {_TORCH[tensor.dtype] for tensor in self.stored.values()}
        return stored.pop() if len(stored) == 1 else torch.float32

    def fingerprint(self) -> str:
        """A hash that tells these weights from others without reading them all: of names, shapes, dtypes, and each tensor's
        first row."""
        digest = hashlib.sha256()
        with ExitStack() as stack, torch.device("cpu"):  # a model may be under construction on another
            handles: dict[Path, Any] = {}
            for tensor in sorted(self.tensors(), key=lambda tensor: tensor.name):
                if tensor.file not in handles:
                    handles[tensor.file] = stack.enter_context(safe_open(tensor.file, framework="pt"))
                row = handles[tensor.file].get_slice(tensor.name)[:1].flatten()[: tensor.shape[-1]].contiguous()
                digest.update(f"{tensor.name} {tensor.shape} {tensor.dtype}".encode())
                digest.update(row.view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def experts(self, dtype: torch.dtype | None = None, lora: ExpertLora | None = None) -> Iterator[ExpertWeights]:
        """Read the experts one after the other, every tensor once.

        Use or copy an expert's weights before the next one: they may be views of the mapped file, whose pages are then dropped
        from resident memory.

        Args:
            dtype: to convert to; None keeps the checkpoint's (bfloat16 for FP8).
            lora: to merge: each weight becomes ``W + scaling * B @ A``, summed in float32 and rounded once.
        """
        dtype = dtype or self.dtype
        for expert, (weights, pages) in enumerate(self._read()):
            if lora is not None:
                weights = [w.float() + lora.delta(p, expert) for w, p in zip(weights, PROJECTIONS, strict=True)]
            yield ExpertWeights(*(weight.to(dtype) for weight in weights))
            for tensor in pages:
                drop_pages(tensor)

    def read_ahead(self) -> None:
        """Have the system read the tensors into its page cache in the background."""
        get = _reader()
        for tensor in self.tensors():
            prefetch_pages(get(tensor))

    def _read(self) -> Iterator[tuple[list[torch.Tensor], list[torch.Tensor]]]:
        """Each expert's (gate, up and down as [out, in]; the mapped tensors that they come from). FP8 weights are float32."""
        get, fused, h, i = _reader(), self.fused, self.module.shape.hidden_size, self.module.shape.intermediate_size

        def part(tensor: StoredTensor, expert: int) -> torch.Tensor:
            return get(tensor)[expert] if fused else get(tensor)

        for expert in range(self.module.shape.num_experts):
            pieces: list[Piece] = [(w, None) for w in FUSED] if fused else [(p, expert) for p in PROJECTIONS]
            stored = [self.stored[piece] for piece in pieces]
            pages = [part(tensor, expert) for tensor in stored]
            weights = [
                page if tensor.scale is None or self.block is None
                else dequantize(page, part(tensor.scale, expert), self.block)
                for tensor, page in zip(stored, pages, strict=True)
            ]  # fmt: skip
            if fused:  # [2I, H] and [H, I], or transposed
                sizes = (2 * i, h), (h, i)
                gate_up, down = (w if w.shape == size else w.T for w, size in zip(weights, sizes, strict=True))
                weights = [gate_up[:i], gate_up[i:], down]
            yield weights, pages


def _reader() -> Callable[[StoredTensor], torch.Tensor]:
    """A function that reads tensors as views of their mapped files, and opens each file once."""
    opened = cache(lambda file: safe_open(file, framework="pt", device="cpu"))
    return lambda tensor: opened(tensor.file).get_tensor(tensor.name)
