"""Where a checkpoint keeps each layer's experts, and reading one layer at a time.

Names are mapped by transformers' own conversion rules (``conversion_mapping.py``), so that every naming transformers
can load is understood: one tensor per expert (``experts.5.gate_proj.weight``, Mixtral's ``w1``/``w3``/``w2``) or fused
(``gate_up_proj``, ``down_proj``). FP8 weights are dequantised while they are read.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from ..adapters import ExpertLora
from ..errors import KTModelError, name_some
from ..machine import forget_pages
from .contract import ExpertsModule
from .fp8 import FP8, SCALE_SUFFIX, block_size, check_scales, dequantize

_NUMBER = re.compile(r"(?<=\.experts\.)\d+(?=\.)")
_SIZES = {"F32": 4, "F16": 2, "BF16": 2, FP8: 1}
_TORCH = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, FP8: torch.bfloat16}
"""what weights are held as that are kept as they are; FP8 as LLaMA-Factory holds it after dequantising"""
_FUSED = ("gate_up_proj", "down_proj")


def weight_files(directory: Path) -> list[Path]:
    """A checkpoint's safetensors files: those its index names, else all of them; none where there is no such directory."""
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        return [directory / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
    return sorted(directory.glob("*.safetensors")) if directory.is_dir() else []


@dataclass
class LayerWeights:
    """One layer's expert weights: gate and up [E, I, H], down [E, H, I], on the CPU, in the checkpoint's dtype."""

    gate: torch.Tensor
    up: torch.Tensor
    down: torch.Tensor


@dataclass
class _Tensor:
    """A checkpoint tensor that fills (a slice of) one target."""

    name: str
    file: Path
    shape: tuple[int, ...]
    dtype: str
    scale: _Tensor | None = None
    """of an FP8 weight"""


@dataclass
class _Layer:
    module: ExpertsModule
    per_expert: dict[str, dict[int, _Tensor]] = field(default_factory=lambda: {"gate": {}, "up": {}, "down": {}})
    fused: dict[str, _Tensor] = field(default_factory=dict)

    def weights(self) -> list[_Tensor]:
        return [t for experts in self.per_expert.values() for t in experts.values()] + list(self.fused.values())

    def tensors(self) -> list[_Tensor]:
        """Weights and their scales."""
        return self.weights() + [weight.scale for weight in self.weights() if weight.scale is not None]


class ExpertsCheckpoint:
    """The expert tensors of a checkpoint, located by headers only.

    Args:
        model: the still empty model, its experts modules in place (for names and conversions).
        modules: what :func:`find_experts` found in it.
        files: the checkpoint's safetensors files.

    Raises:
        KTModelError: The files are not safetensors or damaged; a tensor is missing, has another shape or a dtype that
            is not floating point; an FP8 weight has no scales; the checkpoint's conversion is not one that is understood.
    """

    def __init__(self, model: nn.Module, modules: Sequence[ExpertsModule], files: Sequence[str | Path]):
        self.modules = list(modules)
        self._layers = {module.name: _Layer(module) for module in modules}
        self.target_names: set[str] = set()
        """names that transformers will find unexpected, since no parameter asks for them any more"""
        self.block = block_size(getattr(model.config, "quantization_config", None))
        """of an FP8 checkpoint: the rows and columns that share a scale"""
        self._locate(model, [Path(file) for file in files])
        for layer in self._layers.values():
            self._check(layer)

    def _locate(self, model: Any, files: list[Path]) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

        rules = get_model_conversion_mapping(model)
        renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
        converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
        by_pattern = {pattern: rule for rule in converters for pattern in rule.source_patterns}
        state = model.state_dict()
        scales: dict[str, _Tensor] = {}
        headers: dict[str, tuple[tuple[int, ...], str]] = {}
        for file in files:
            if file.suffix != ".safetensors":
                raise KTModelError(
                    f"{file}: experts are read from safetensors files only; convert the checkpoint first."
                )
            try:
                with safe_open(file, framework="pt") as handle:
                    for name in handle.keys():  # noqa: SIM118 (safe_open is no mapping)
                        target, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, state)
                        module, _, weight = target.rpartition(".")
                        wanted = module in self._layers and weight.removesuffix(SCALE_SUFFIX) in _FUSED
                        if not wanted and self.block is None:
                            continue
                        piece = handle.get_slice(name)
                        tensor = _Tensor(name, file, tuple(piece.get_shape()), piece.get_dtype())
                        headers[name] = tensor.shape, tensor.dtype
                        if wanted:
                            self.target_names.add(target)
                        if wanted and weight.endswith(SCALE_SUFFIX):
                            scales[name] = tensor
                        elif wanted:
                            rule = by_pattern[pattern] if pattern is not None else None
                            self._place(self._layers[module], weight, tensor, rule, pattern)
            except (SafetensorError, OSError) as error:
                raise KTModelError(
                    f"{file} cannot be read as safetensors ({error}); download or copy it again."
                ) from error
        if self.block is not None:
            check_scales(headers, self.block)
            for tensor in (tensor for layer in self._layers.values() for tensor in layer.weights()):
                tensor.scale = scales.get(tensor.name + SCALE_SUFFIX)

    @staticmethod
    def _place(layer: _Layer, weight: str, tensor: _Tensor, rule: Any, pattern: str | None) -> None:
        operations = [type(operation).__name__ for operation in rule.operations] if rule is not None else []
        if operations in ([], ["Transpose"]):  # Transpose turns a fused tensor only where its shape asks for it
            layer.fused[weight] = tensor
        elif operations in (["MergeModulelist"], ["MergeModulelist", "Concatenate"]):
            number = _NUMBER.search(tensor.name)
            if number is None:
                raise KTModelError(f"{tensor.file}: Unsupported weight naming scheme: {tensor.name}.")
            projection = "down" if weight == "down_proj" else ("gate", "up")[rule.source_patterns.index(pattern)]
            layer.per_expert[projection][int(number[0])] = tensor
        else:
            raise KTModelError(
                f"{tensor.file}: Unsupported weight naming scheme: {tensor.name} is converted by {' + '.join(operations)}."
            )

    def _check(self, layer: _Layer) -> None:
        module, shape = layer.module, layer.module.shape
        if layer.fused:
            missing = [f"{module.name}.{weight}" for weight in _FUSED if weight not in layer.fused]
        else:
            missing = []
            for projection, experts in layer.per_expert.items():
                example = next(iter(experts.values()), None)
                for expert in (e for e in range(shape.num_experts) if e not in experts):
                    name = f"{module.name}.{expert}.{projection}_proj.weight"
                    missing.append(_NUMBER.sub(str(expert), example.name) if example else name)
        if missing:
            raise KTModelError(
                f"The checkpoint is missing {len(missing)} expert tensors of layer {module.layer}: {name_some(missing, 3)}. "
                "Check that all shards are there and that config.json belongs to them."
            )
        for projection, experts in layer.per_expert.items():
            for tensor in experts.values():
                self._check_tensor(tensor, (shape.projection(projection),))
        hidden, double = shape.hidden_size, 2 * shape.intermediate_size
        for weight, tensor in layer.fused.items():
            rows, columns = (double, hidden) if weight == "gate_up_proj" else (hidden, shape.intermediate_size)
            both = (shape.num_experts, rows, columns), (shape.num_experts, columns, rows)
            self._check_tensor(tensor, both)

    def _check_tensor(self, tensor: _Tensor, wanted: tuple[tuple[int, ...], ...]) -> None:
        if tensor.shape not in wanted:
            raise KTModelError(
                f"{tensor.file}: {tensor.name} has shape {tensor.shape}, config.json asks for {wanted[0]}."
            )
        if tensor.dtype not in _SIZES or (tensor.dtype == FP8 and self.block is None):
            raise KTModelError(
                f"{tensor.file}: {tensor.name} is {tensor.dtype}; experts must be stored as F32, F16 or BF16, or as {FP8} with "
                "scales and a quantization_config in config.json that says so."
            )

    def names(self) -> dict[str, dict[str, tuple[str, int | None]]]:
        """module -> checkpoint tensor -> (projection, expert), or (``gate_up_proj`` or ``down_proj``, None) where fused."""
        found: dict[str, dict[str, tuple[str, int | None]]] = {}
        for module, layer in self._layers.items():
            pieces: dict[str, tuple[str, int | None]] = {t.name: (weight, None) for weight, t in layer.fused.items()}
            for projection, experts in layer.per_expert.items():
                pieces |= {tensor.name: (projection, expert) for expert, tensor in experts.items()}
            found[module] = pieces
        return found

    def fingerprint(self, name: str) -> str:
        """What tells one module's weights from another version's without reading them all: names, shapes, dtypes, and
        the first row of each tensor."""
        digest = hashlib.sha256()
        with ExitStack() as stack, torch.device("cpu"):  # the model may be under construction on another
            handles: dict[Path, Any] = {}
            for tensor in sorted(self._layers[name].tensors(), key=lambda tensor: tensor.name):
                if tensor.file not in handles:
                    handles[tensor.file] = stack.enter_context(safe_open(tensor.file, framework="pt"))
                row = handles[tensor.file].get_slice(tensor.name)[:1].flatten()[: tensor.shape[-1]].contiguous()
                digest.update(f"{tensor.name} {tensor.shape} {tensor.dtype}".encode())
                digest.update(row.view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def nbytes(self, name: str) -> int:
        """Bytes on disk of one module's experts."""
        return sum(prod(tensor.shape) * _SIZES[tensor.dtype] for tensor in self._layers[name].tensors())

    def dtypes(self) -> set[str]:
        """The dtypes the experts are stored in, in safetensors' names."""
        return {tensor.dtype for layer in self._layers.values() for tensor in layer.weights()}

    def dtype(self, name: str) -> torch.dtype:
        """The dtype one module's experts are stored in, or bfloat16 for FP8; float32 where they differ."""
        stored = {_TORCH[tensor.dtype] for tensor in self._layers[name].weights()}
        return stored.pop() if len(stored) == 1 else torch.float32

    def read(
        self, name: str, dtype: torch.dtype | None, padded: tuple[int, int], lora: ExpertLora | None = None
    ) -> LayerWeights:
        """Read one module's experts, each tensor once; what has been copied no longer counts as resident memory.

        Args:
            dtype: to convert to while copying; None keeps the checkpoint's (bfloat16 for FP8).
            padded: hidden and intermediate size of the result; what exceeds the model's own is zero.
            lora: to be merged: each weight becomes ``W + scaling * B @ A``, summed in float32 and rounded once.
        """
        layer = self._layers[name]
        dtype = dtype or self.dtype(name)
        shape = layer.module.shape
        hidden, intermediate = padded
        make = torch.empty if padded == (shape.hidden_size, shape.intermediate_size) else torch.zeros
        weights = LayerWeights(
            make(shape.num_experts, intermediate, hidden, dtype=dtype, device="cpu"),
            make(shape.num_experts, intermediate, hidden, dtype=dtype, device="cpu"),
            make(shape.num_experts, hidden, intermediate, dtype=dtype, device="cpu"),
        )
        h, i = shape.hidden_size, shape.intermediate_size
        views = {"gate": weights.gate[:, :i, :h], "up": weights.up[:, :i, :h], "down": weights.down[:, :h, :i]}
        for projection, expert, matrix in self._matrices(layer):
            if lora is not None:
                matrix = matrix.float() + lora.delta(projection, expert)
            views[projection][expert].copy_(matrix)
        return weights

    def _matrices(self, layer: _Layer) -> Iterator[tuple[str, int, torch.Tensor]]:
        """(projection, expert, weight [out, in]) one after the other; FP8 comes as float32."""
        handles: dict[Path, Any] = {}

        def get(tensor: _Tensor) -> torch.Tensor:
            if tensor.file not in handles:
                handles[tensor.file] = safe_open(tensor.file, framework="pt", device="cpu")
            value: torch.Tensor = handles[tensor.file].get_tensor(tensor.name)
            return value

        def plain(weight: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
            return weight if scale is None or self.block is None else dequantize(weight, scale, self.block)

        for projection, experts in layer.per_expert.items():
            for expert, tensor in experts.items():
                value = get(tensor)
                yield projection, expert, plain(value, get(tensor.scale) if tensor.scale else None)
                forget_pages(value)
        h, i = layer.module.shape.hidden_size, layer.module.shape.intermediate_size
        for weight, tensor in layer.fused.items():
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
