"""Where a checkpoint keeps each layer's experts.

Names are mapped by transformers' own conversion rules (``conversion_mapping.py``), so that every naming transformers
can load is understood: one tensor per expert (``experts.5.gate_proj.weight``, Mixtral's ``w1``/``w3``/``w2``) or fused
(``gate_up_proj``, ``down_proj``).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import nn

from ..ground.errors import KTModelError, name_some
from .discovery import ExpertsModule
from .fp8 import FP8, SCALE_SUFFIX, block_size, check_scales
from .reader import SIZES, LayerTensors, StoredTensor

_NUMBER = re.compile(r"(?<=\.experts\.)\d+(?=\.)")
_FUSED = ("gate_up_proj", "down_proj")


class CheckpointLayout:
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
        self.block = block_size(getattr(model.config, "quantization_config", None))
        """of an FP8 checkpoint: the rows and columns that share a scale"""
        self._layers = {module.name: LayerTensors(module, self.block) for module in modules}
        self.target_names: set[str] = set()
        """names that transformers will find unexpected, since no parameter asks for them any more"""
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
        scales: dict[str, StoredTensor] = {}
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
                        tensor = StoredTensor(name, file, tuple(piece.get_shape()), piece.get_dtype())
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
    def _place(layer: LayerTensors, weight: str, tensor: StoredTensor, rule: Any, pattern: str | None) -> None:
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

    def _check(self, layer: LayerTensors) -> None:
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

    def _check_tensor(self, tensor: StoredTensor, wanted: tuple[tuple[int, ...], ...]) -> None:
        if tensor.shape not in wanted:
            raise KTModelError(
                f"{tensor.file}: {tensor.name} has shape {tensor.shape}, config.json asks for {wanted[0]}."
            )
        if tensor.dtype not in SIZES or (tensor.dtype == FP8 and self.block is None):
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

    def layer(self, name: str) -> LayerTensors:
        """One module's tensors."""
        return self._layers[name]

    def after(self, module: ExpertsModule) -> ExpertsModule | None:
        """The next of the modules."""
        following = self.modules.index(module) + 1
        return self.modules[following] if following < len(self.modules) else None

    def dtypes(self) -> set[str]:
        """The dtypes the experts are stored in, in safetensors' names."""
        return {tensor.dtype for layer in self._layers.values() for tensor in layer.weights()}
