"""One layer's expert tensors in a checkpoint: what they are, and reading them. FP8 weights are dequantised on the way."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cache
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from ..adapters import ExpertLora
from ..used_memory import expect_pages, forget_pages
from .contract import ExpertsModule
from .fp8 import FP8, Block, dequantize

SIZES = {"F32": 4, "F16": 2, "BF16": 2, FP8: 1}
"""bytes of a number of each dtype that experts may be stored in, by safetensors' names"""
_TORCH = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, FP8: torch.bfloat16}
"""what weights are held as that are kept as they are; FP8 as LLaMA-Factory holds it after dequantising"""


@dataclass
class LayerWeights:
    """One layer's expert weights: gate and up [E, I, H], down [E, H, I], on the CPU, in the checkpoint's dtype."""

    gate: torch.Tensor
    up: torch.Tensor
    down: torch.Tensor


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

    def read(self, dtype: torch.dtype | None, padded: tuple[int, int], lora: ExpertLora | None = None) -> LayerWeights:
        """Read each tensor once; what has been copied no longer counts as resident memory.

        Args:
            dtype: to convert to while copying; None keeps the checkpoint's (bfloat16 for FP8).
            padded: hidden and intermediate size of the result; what exceeds the model's own is zero.
            lora: to be merged: each weight becomes ``W + scaling * B @ A``, summed in float32 and rounded once.
        """
        dtype = dtype or self.dtype
        shape = self.module.shape
        hidden, intermediate = padded
        make = torch.empty if padded == (shape.hidden_size, shape.intermediate_size) else torch.zeros
        weights = LayerWeights(
            make(shape.num_experts, intermediate, hidden, dtype=dtype, device="cpu"),
            make(shape.num_experts, intermediate, hidden, dtype=dtype, device="cpu"),
            make(shape.num_experts, hidden, intermediate, dtype=dtype, device="cpu"),
        )
        h, i = shape.hidden_size, shape.intermediate_size
        views = {"gate": weights.gate[:, :i, :h], "up": weights.up[:, :i, :h], "down": weights.down[:, :h, :i]}
        for projection, expert, matrix in self._matrices():
            if lora is not None:
                matrix = matrix.float() + lora.delta(projection, expert)
            views[projection][expert].copy_(matrix)
        return weights

    def read_ahead(self) -> None:
        """Have the system read the tensors into its cache, while the process does something else."""
        get = _reader()
        for tensor in self.tensors():
            expect_pages(get(tensor))

    def _matrices(self) -> Iterator[tuple[str, int, torch.Tensor]]:
        """(projection, expert, weight [out, in]) one after the other; FP8 comes as float32."""
        get = _reader()

        def plain(weight: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
            return weight if scale is None or self.block is None else dequantize(weight, scale, self.block)

        for projection, experts in self.per_expert.items():
            for expert, tensor in experts.items():
                value = get(tensor)
                yield projection, expert, plain(value, get(tensor.scale) if tensor.scale else None)
                forget_pages(value)
        h, i = self.module.shape.hidden_size, self.module.shape.intermediate_size
        for weight, tensor in self.fused.items():
            values, scales = get(tensor), get(tensor.scale) if tensor.scale else None
            turned = values.shape[1:] != ((2 * i, h) if weight == "gate_up_proj" else (h, i))
            for expert, value in enumerate(values):
                matrix = plain(value, scales[expert] if scales is not None else None)
                matrix = matrix.T if turned else matrix
                if weight == "gate_up_proj":
                    yield "gate", expert, matrix[:i]
                    yield "up", expert, matrix[i:]
                else:
                    yield "down", expert, matrix
                forget_pages(value)


def _reader() -> Callable[[StoredTensor], torch.Tensor]:
    """Reads tensors, as views of their mapped files; each file is opened once."""
    opened = cache(lambda file: safe_open(file, framework="pt", device="cpu"))
    return lambda tensor: opened(tensor.file).get_tensor(tensor.name)
