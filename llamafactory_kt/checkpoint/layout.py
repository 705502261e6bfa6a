"""Where a checkpoint keeps each layer's experts.

transformers' own conversion rules map the names (:mod:`..peft_side.model_names`), so every naming that transformers can
load is understood: one tensor per expert (``experts.5.gate_proj.weight``, Mixtral's ``w1``/``w3``/``w2``) or fused ones
(``gate_up_proj``, ``down_proj``).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import nn

from ..ground.errors import KTModelError, name_some
from ..peft_side.model_names import CheckpointNames, Target
from .discovery import ExpertsModule
from .fp8 import FP8, SCALE_SUFFIX, block_size, check_scales
from .reader import SIZES, LayerTensors, Piece, StoredTensor

_NUMBER = re.compile(r"(?<=\.experts\.)\d+(?=\.)")


class CheckpointLayout:
    """The expert tensors of a checkpoint, located by headers only.

    Args:
        model: the empty model with its experts modules in place; its names and conversions are used.
        modules: its experts modules, from :func:`find_experts`.
        files: the checkpoint's safetensors files.

    Raises:
        KTModelError: A file is damaged or not safetensors; a tensor is missing, or has another shape or a dtype that is
            not supported; an FP8 weight has no scales; transformers converts the experts in an unknown way.
    """

    def __init__(self, model: nn.Module, modules: Sequence[ExpertsModule], files: Sequence[Path]):
        self.modules = list(modules)
        self.block = block_size(getattr(model.config, "quantization_config", None))
        """of an FP8 checkpoint, else None"""
        self._layers = {module.name: LayerTensors(module, self.block) for module in modules}
        self.target_names: set[str] = set()
        """the experts' tensors, as transformers names them"""
        self._locate(model, files)
        for layer in self._layers.values():
            self._check(layer)

    def _locate(self, model: Any, files: Sequence[Path]) -> None:
        names = CheckpointNames(model)
        scales: dict[str, StoredTensor] = {}
        headers: dict[str, tuple[tuple[int, ...], str]] = {}
        for tensor in (tensor for file in files for tensor in _stored_tensors(file)):
            headers[tensor.name] = tensor.shape, tensor.dtype
            target = names.target(tensor.name)
            module, _, weight = target.name.rpartition(".")
            layer = self._layers.get(module)
            if layer is None or weight.removesuffix(SCALE_SUFFIX) not in (*layer.module.weights, *layer.module.biases):
                continue
            self.target_names.add(target.name)
            if weight.endswith(SCALE_SUFFIX):
                scales[tensor.name] = tensor
            else:
                _place(layer, tensor, target)
        if self.block is not None:
            check_scales(headers, self.block)
            for tensor in (tensor for layer in self._layers.values() for tensor in layer.stored.values()):
                tensor.scale = scales.get(tensor.name + SCALE_SUFFIX)

    def _check(self, layer: LayerTensors) -> None:
        module, shape = layer.module, layer.module.shape
        pieces = list(dict.fromkeys(chain.from_iterable(map(layer.of_expert, range(shape.num_experts)))))
        pieces += [(bias, None) for bias in module.biases]
        missing = [_name(layer, *piece) for piece in pieces if piece not in layer.stored]
        if missing:
            raise KTModelError(
                f"The checkpoint is missing {len(missing)} expert tensors of layer {module.layer}: {name_some(missing, 3)}. "
                "Check that all shards are there and that config.json belongs to them."
            )
        for (weight, expert), tensor in layer.stored.items():
            allowed: list[tuple[int, ...]]
            if expert is not None:
                allowed = [shape.projection(weight)]
            elif weight in module.biases:
                out, width = layer.parameter(weight.removesuffix("_bias"))
                allowed = [(shape.num_experts, width if shape.fused.transposed else out)]
            else:
                out, width = layer.parameter(weight)
                allowed = [(shape.num_experts, out, width), (shape.num_experts, width, out)]
            if tensor.shape not in allowed:
                raise KTModelError(
                    f"{tensor.file}: {tensor.name} has shape {tensor.shape}, config.json asks for {allowed[0]}."
                )
            if tensor.dtype not in SIZES or (tensor.dtype == FP8 and self.block is None):
                raise KTModelError(
                    f"{tensor.file}: {tensor.name} is {tensor.dtype}; experts must be stored as F32, F16 or BF16, or as {FP8} with "
                    "scales and a quantization_config in config.json that says so."
                )

    def names(self) -> dict[str, dict[str, Piece]]:
        """module -> checkpoint tensor -> what it is of the module's experts."""
        layers = self._layers.items()
        return {name: {tensor.name: piece for piece, tensor in layer.stored.items()} for name, layer in layers}

    def layer(self, name: str) -> LayerTensors:
        """One module's tensors."""
        return self._layers[name]

    def after(self, module: ExpertsModule) -> ExpertsModule | None:
        """The next experts module, None after the last."""
        following = self.modules.index(module) + 1
        return self.modules[following] if following < len(self.modules) else None

    @property
    def itemsize(self) -> int:
        """Bytes of one value of the experts' weights as they are read; the largest, where layers differ."""
        return max(layer.dtype.itemsize for layer in self._layers.values())

    def dtypes(self) -> set[str]:
        """The dtypes that the experts are stored in, by safetensors' names."""
        return {tensor.dtype for layer in self._layers.values() for tensor in layer.stored.values()}


def _stored_tensors(file: Path) -> Iterator[StoredTensor]:
    if file.suffix != ".safetensors":
        raise KTModelError(f"{file}: experts are read from safetensors files only; convert the checkpoint first.")
    try:
        with safe_open(file, framework="pt") as handle:
            for name in handle.keys():  # noqa: SIM118 (safe_open is no mapping)
                piece = handle.get_slice(name)
                yield StoredTensor(name, file, tuple(piece.get_shape()), piece.get_dtype())
    except (SafetensorError, OSError) as error:
        raise KTModelError(f"{file} cannot be read as safetensors ({error}); download or copy it again.") from error


def _place(layer: LayerTensors, tensor: StoredTensor, target: Target) -> None:
    weight, operations = target.name.rpartition(".")[2], target.operations
    if operations in ([], ["Transpose"]):  # Transpose turns a fused tensor only if its shape asks for it
        layer.stored[weight, None] = tensor
    elif operations in (["MergeModulelist"], ["MergeModulelist", "Concatenate"]) and weight in layer.module.weights:
        number = _NUMBER.search(tensor.name)
        if number is None:
            raise KTModelError(f"{tensor.file}: Unsupported weight naming scheme: {tensor.name}.")
        firsts = [name for name in layer.module.shape.projections if name != "down"]
        projection = "down" if weight == "down_proj" else firsts[target.source]
        layer.stored[projection, int(number[0])] = tensor
    else:
        raise KTModelError(
            f"{tensor.file}: Unsupported weight naming scheme: {tensor.name} is converted by {' + '.join(operations)}."
        )


def _name(layer: LayerTensors, weight: str, expert: int | None) -> str:
    """The name that a missing tensor would have."""
    if expert is None:
        return f"{layer.module.name}.{weight}"
    example = next((tensor for (projection, _), tensor in layer.stored.items() if projection == weight), None)
    name = f"{layer.module.name}.{expert}.{weight}_proj.weight"
    return _NUMBER.sub(str(expert), example.name) if example else name
