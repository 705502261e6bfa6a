"""One layer's expert tensors in a checkpoint: what they are, and reading them. FP8 weights are dequantised on the way."""

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
from ..ground.paging import expect_pages, forget_pages, in_large_pages
from .discovery import ExpertsModule
from .fp8 import FP8, Block, dequantize

SIZES = {"F32": 4, "F16": 2, "BF16": 2, FP8: 1}
"""bytes of a number of each dtype that experts may be stored in, by safetensors' names"""
_TORCH = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, FP8: torch.bfloat16}
"""what weights are held as that are kept as they are; FP8 as LLaMA-Factory holds it after dequantising"""


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
        """Copy the experts side by side.

        Args:
            padded: hidden and intermediate size of the result; what exceeds the experts' own is zero.
        """
        hidden, intermediate = padded
        make = torch.empty if padded == (shape.hidden_size, shape.intermediate_size) else torch.zeros
        sizes = (intermediate, hidden), (intermediate, hidden), (hidden, intermediate)
        stacks = [in_large_pages(make(shape.num_experts, *size, dtype=dtype, device="cpu")) for size in sizes]
        for number, expert in enumerate(experts):
            for stack, matrix in zip(stacks, expert, strict=True):
                stack[number, : matrix.shape[0], : matrix.shape[1]].copy_(matrix)
        return cls(*stacks)


@dataclass
class StoredTensor:
    """A checkpoint tensor that fills (a slice of) one target."""

    name: str
    file: Path
    shape: tuple[int, ...]
    dtype: str
    """in safetensors' spelling"""
    scale: StoredTensor | None = None
    """of an FP8 weight"""


@dataclass
class LayerTensors:
    """Where one module's experts are: a tensor for each expert and projection, or fused ones."""

    module: ExpertsModule
    block: Block | None
    """of an FP8 checkpoint: the rows and columns that share a scale"""
    per_expert: dict[str, dict[int, StoredTensor]] = field(default_factory=lambda: {"gate": {}, "up": {}, "down": {}})
    fused: dict[str, StoredTensor] = field(default_factory=dict)

    def weights(self) -> list[StoredTensor]:
        """Without scales."""
        return [t for experts in self.per_expert.values() for t in experts.values()] + list(self.fused.values())

    def tensors(self) -> list[StoredTensor]:
        """Weights and their scales."""
        return self.weights() + [weight.scale for weight in self.weights() if weight.scale is not None]

    @property
    def nbytes(self) -> int:
        """On disk."""
        return sum(prod(tensor.shape) * SIZES[tensor.dtype] for tensor in self.tensors())

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights, or bfloat16 for FP8; float32 where they differ."""
        stored = {_TORCH[tensor.dtype] for tensor in self.weights()}
        return stored.pop() if len(stored) == 1 else torch.float32

    def fingerprint(self) -> str:
        """What tells these weights from another version's without reading them all: names, shapes, dtypes, and the first
        row of each tensor."""
        digest = hashlib.sha256()
        with ExitStack() as stack, torch.device("cpu"):  # the model may be under construction on another
            handles: dict[Path, Any] = {}
            for tensor in sorted(self.tensors(), key=lambda tensor: tensor.name):
                if tensor.file not in handles:
                    handles[tensor.file] = stack.enter_context(safe_open(tensor.file, framework="pt"))
                row = handles[tensor.file].get_slice(tensor.name)[:1].flatten()[: tensor.shape[-1]].contiguous()
                digest.update(f"{tensor.name} {tensor.shape} {tensor.dtype}".encode())
                digest.update(row.view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def experts(self, dtype: torch.dtype | None = None, lora: ExpertLora | None = None) -> Iterator[ExpertWeights]:
        """Each expert in turn, every tensor read once; its weights are to be used, or copied, before the next is asked
        for: they may lie in the mapped file, and what has been read no longer counts as resident memory.

        Args:
            dtype: to convert to; None keeps the checkpoint's (bfloat16 for FP8).
            lora: to be merged: each weight becomes ``W + scaling * B @ A``, summed in float32 and rounded once.
        """
        dtype = dtype or self.dtype
        for expert, (weights, pages) in enumerate(self._fused() if self.fused else self._per_expert()):
            if lora is not None:
                deltas = (lora.delta(projection, expert) for projection in PROJECTIONS)
                weights = ExpertWeights(*(w.float() + delta for w, delta in zip(weights, deltas, strict=True)))
            yield ExpertWeights(*(weight.to(dtype) for weight in weights))
            for tensor in pages:
                forget_pages(tensor)

    def read_ahead(self) -> None:
        """Have the system read the tensors into its cache, while the process does something else."""
        get = _reader()
        for tensor in self.tensors():
            expect_pages(get(tensor))

    def _per_expert(self) -> Iterator[tuple[ExpertWeights, list[torch.Tensor]]]:
        """(weights, what of the mapped files they were made from); FP8 comes as float32."""
        get = _reader()
        for expert in range(self.module.shape.num_experts):
            stored = [self.per_expert[projection][expert] for projection in PROJECTIONS]
            pages = [get(tensor) for tensor in stored]
            scales = [get(tensor.scale) if tensor.scale else None for tensor in stored]
            yield ExpertWeights(*map(self._plain, pages, scales)), pages

    def _fused(self) -> Iterator[tuple[ExpertWeights, list[torch.Tensor]]]:
        h, i = self.module.shape.hidden_size, self.module.shape.intermediate_size
        both = zip(self._slices("gate_up_proj", (2 * i, h)), self._slices("down_proj", (h, i)), strict=True)
        for (first, gate_up), (second, down) in both:
            yield ExpertWeights(gate_up[:i], gate_up[i:], down), [first, second]

    def _slices(self, weight: str, size: tuple[int, int]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Each expert's part of a fused tensor: what lies in the mapped file, and that as [out, in]."""
        get, tensor = _reader(), self.fused[weight]
        scales = get(tensor.scale) if tensor.scale else None
        for expert, page in enumerate(get(tensor)):
            plain = self._plain(page, scales[expert] if scales is not None else None)
            yield page, plain if page.shape == size else plain.T

    def _plain(self, weight: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
        return weight if scale is None or self.block is None else dequantize(weight, scale, self.block)


def _reader() -> Callable[[StoredTensor], torch.Tensor]:
    """Reads tensors, as views of their mapped files; each file is opened once."""
    opened = cache(lambda file: safe_open(file, framework="pt", device="cpu"))
    return lambda tensor: opened(tensor.file).get_tensor(tensor.name)
