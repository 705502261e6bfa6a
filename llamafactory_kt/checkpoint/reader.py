"""Reading one layer's expert tensors from a checkpoint. FP8 weights are dequantized on the way."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
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


Piece = tuple[str, int | None]
"""of a layer's experts: (projection, expert), or (one of the module's ``weights`` or ``biases``, None)"""


class ExpertWeights(NamedTuple):
    """One expert's weights: gate and up [I, H], down [H, I], on the CPU. Without a gate, gate is [0, H]."""

    gate: torch.Tensor
    up: torch.Tensor
    down: torch.Tensor


class ExpertBiases(NamedTuple):
    """A layer's biases: gate and up [E, I], down [E, H], float32 on the CPU. Without a gate, gate is [E, 0]."""

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
    """weights and biases; :meth:`tensors` are their scales too"""

    @property
    def fused(self) -> bool:
        return any((weight, None) in self.stored for weight in self.module.weights)

    def of_expert(self, expert: int) -> list[Piece]:
        """The pieces that hold one expert's weights."""
        if self.fused:
            return [(weight, None) for weight in self.module.weights]
        return [(projection, expert) for projection in self.module.shape.projections]

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
        stored = {_TORCH[tensor.dtype] for (name, _), tensor in self.stored.items() if name not in self.module.biases}
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

    def by_name(self, experts: Sequence[int]) -> dict[str, torch.Tensor]:
        """Read some experts' weights as the checkpoint names and lays them out, in float32; fused ones with these experts alone."""
        get = _reader()

        def read(tensor: StoredTensor, expert: int | None) -> torch.Tensor:
            def part(stored: StoredTensor) -> torch.Tensor:
                return get(stored) if expert is None else get(stored)[expert]

            if tensor.scale is None or self.block is None:
                return part(tensor).float()
            return dequantize(part(tensor), part(tensor.scale), self.block)

        return {
            tensor.name: torch.stack([read(tensor, number) for number in experts])
            if expert is None else read(tensor, None)
            for (_, expert), tensor in self.stored.items()
            if expert is None or expert in experts
        }  # fmt: skip

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

    def biases(self) -> ExpertBiases | None:
        """Read the biases, where the formula has any."""
        module = self.module
        if not module.biases:
            return None
        get = _reader()
        first, down = (get(self.stored[name, None]).float() for name in module.biases)
        shape = module.shape
        gate, up = shape.fused.split(first, 1) if shape.has_gate else (first[:, :0], first)
        return ExpertBiases(*(bias.contiguous() for bias in (gate, up, down)))

    def read_ahead(self) -> None:
        """Have the system read the tensors into its page cache in the background."""
        get = _reader()
        for tensor in self.tensors():
            prefetch_pages(get(tensor))

    def _read(self) -> Iterator[tuple[list[torch.Tensor], list[torch.Tensor]]]:
        """Each expert's (gate, up and down as [out, in]; the mapped tensors that they come from). FP8 weights are float32."""
        get, fused = _reader(), self.fused

        def part(tensor: StoredTensor, expert: int) -> torch.Tensor:
            return get(tensor)[expert] if fused else get(tensor)

        for expert in range(self.module.shape.num_experts):
            stored = [self.stored[piece] for piece in self.of_expert(expert)]
            pages = [part(tensor, expert) for tensor in stored]
            weights = [
                page if tensor.scale is None or self.block is None
                else dequantize(page, part(tensor.scale, expert), self.block)
                for tensor, page in zip(stored, pages, strict=True)
            ]  # fmt: skip
            yield (self.canonical(*weights) if fused else self._with_gate(weights)), pages

    def canonical(self, first: torch.Tensor, down: torch.Tensor) -> list[torch.Tensor]:
        """gate, up and down as [out, in], of one expert's fused weights, which are stored like the model's parameters, or, in older
        checkpoints, the other way round."""
        shape, layout = self.module.shape, self.module.shape.fused
        plain = []
        for weight, name in ((first, self.module.weights[0]), (down, "down_proj")):
            parameter = weight if weight.shape == self.parameter(name) else weight.T
            plain.append(parameter.T if layout.transposed else parameter)
        return [*(layout.split(plain[0], 0) if shape.has_gate else (plain[0][:0], plain[0])), plain[1]]

    def parameter(self, name: str) -> tuple[int, int]:
        """The sizes of one expert's part of a fused weight, as the model stores it."""
        shape = self.module.shape
        out, width = shape.projection("down" if name == "down_proj" else "up")
        return shape.fused.stored(2 * out if name == "gate_up_proj" else out, width)

    def _with_gate(self, weights: list[torch.Tensor]) -> list[torch.Tensor]:
        return weights if self.module.shape.has_gate else [weights[0][:0], *weights]


def _reader() -> Callable[[StoredTensor], torch.Tensor]:
    """A function that reads tensors as views of their mapped files, and opens each file once."""
    opened = cache(lambda file: safe_open(file, framework="pt", device="cpu"))
    return lambda tensor: opened(tensor.file).get_tensor(tensor.name)
