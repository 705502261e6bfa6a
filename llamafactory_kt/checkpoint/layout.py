"""Where a checkpoint keeps each layer's experts.

transformers' own conversion rules map the names (:mod:`..peft_side.model_names`), so every naming that transformers can
load is understood: one tensor per expert (``experts.5.gate_proj.weight``, Mixtral's ``w1``/``w3``/``w2``) or fused ones
(``gate_up_proj``, ``down_proj``). Quantizers split fused experts, as in the FP8 files of Qwen3.5 and Qwen3-VL: tensors
that are named after a module's projections are those, where no rule says otherwise. What a format stores in a weight's place is
found by its own stored name, and mapped by the weight's: transformers' rules know scales in some versions only.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from torch import nn

from ..adapters.fused_layout import USUAL
from ..adapters.keys import PROJECTIONS
from ..ground.errors import KTModelError, name_some
from ..peft_side.model_names import CheckpointNames, Target
from .discovery import ExpertsModule
from .formats import FLOATS, WHOLE, Format, format_of
from .leftovers import check_leftovers
from .reader import LayerTensors, Piece
from .stored import opened, stored_tensors
from .stored_weight import StoredWeight

_NUMBER = re.compile(r"(?<=\.experts\.)\d+(?=\.)")
_OF_ONE_EXPERT = re.compile(r"(.+)\.(\d+)\.(gate|up|down)_proj\.weight")
"""a module, an expert and a projection"""


@dataclass(frozen=True)
class Stored:
    """How the experts' weights are stored, as an engine reads them; the defaults are those of most checkpoints."""

    itemsize: float = 2
    """bytes of a weight in memory; the largest, where layers differ"""
    can_be_mapped: bool = True
    """whether all weights lie in the files as engines multiply them, row by row"""
    converted: int = 0
    """bytes that are in memory also where weights stay mapped"""


class CheckpointLayout:
    """The expert tensors of a checkpoint, located by headers only. The other tensors are checked too, as far as they are quantized.

    Args:
        model: the empty model with its experts modules in place; its names and conversions are used.
        modules: its experts modules, from :func:`find_experts`.
        files: the checkpoint's safetensors files.

    Raises:
        KTModelError: A file is damaged or not safetensors; a tensor is missing, or has another shape or a dtype that is
            not supported; a quantized weight lacks a part; a part belongs to no weight; transformers converts the
            experts, or another quantized weight, in an unknown way.
    """

    def __init__(self, model: nn.Module, modules: Sequence[ExpertsModule], files: Sequence[Path]):
        self.modules = list(modules)
        self.format = format_of(model.config)
        self._prefix = str(getattr(model, "base_model_prefix", ""))
        self._layers = {module.name: LayerTensors(module) for module in modules}
        self._stored: dict[bool, Stored] = {}
        weights = _grouped(self.format, files)
        names = CheckpointNames(model)
        others = self._locate(names, weights)
        self.renamed = {t.name: w.parts[WHOLE] for w, t in others if w.parts.keys() == {WHOLE} and not t.operations}
        """the model's parameters beside the experts that transformers reads as they are stored, by their names in the model"""
        for layer in self._layers.values():
            self._check_complete(layer)
        self._check_quantized(model, names, others)
        check_leftovers(model, self.format, list(self._layers), others)

    def _locate(self, names: CheckpointNames, weights: Iterable[StoredWeight]) -> list[tuple[StoredWeight, Target]]:
        """Place the experts' weights; returns all others, with what transformers makes of them."""
        others = []
        for weight in weights:
            target = names.target(weight.name)
            module, _, attribute = target.name.rpartition(".")
            layer = self._layers.get(module)
            if layer is not None and attribute in (*layer.module.weights, *layer.module.biases):
                _place(layer, weight, target)
            elif not self._place_split(weight, target):
                others.append((weight, target))
        return others

    def _place_split(self, weight: StoredWeight, target: Target) -> bool:
        """Place a tensor of one expert that transformers would not join to the model's fused weight."""
        found = _OF_ONE_EXPERT.fullmatch(target.name) if not target.operations else None
        layer = self._layers.get(found[1]) if found else None
        if not found or layer is None or found[3] not in layer.module.shape.projections:
            return False
        layer.stored[found[3], int(found[2])] = weight
        layer.split = True
        return True

    def _check_complete(self, layer: LayerTensors) -> None:
        module, shape = layer.module, layer.module.shape
        pieces = list(dict.fromkeys(chain.from_iterable(map(layer.of_expert, range(shape.num_experts)))))
        pieces += [(bias, None) for bias in module.biases]
        missing = [_name(layer, *piece) for piece in pieces if piece not in layer.stored]
        if missing:
            raise KTModelError(
                f"The checkpoint is missing {len(missing)} expert tensors of layer {module.layer}: {name_some(missing, 3)}. "
                "Check that all shards are there and that config.json belongs to them."
            )
        if more := [weight.name for piece, weight in layer.stored.items() if piece not in pieces]:
            raise KTModelError(
                f"The checkpoint has {len(more)} expert tensors of layer {module.layer} too many for {shape.num_experts} experts that are "
                f"stored {'together' if layer.fused else 'one by one'}: {name_some(more, 3)}. Check that config.json and all shards "
                "belong to one checkpoint."
            )
        for piece, weight in layer.stored.items():
            if weight.quantized and self.format.parts:
                continue  # checked with all other quantized weights
            tensor, allowed = weight.parts[WHOLE], layer.shapes(*piece)
            if tensor.shape not in allowed:
                raise KTModelError(
                    f"{tensor.file}: {tensor.name} has shape {tensor.shape}, config.json asks for {allowed[0]}."
                )
            if tensor.dtype not in FLOATS:
                raise KTModelError(
                    f"{tensor.file}: {tensor.name} is {tensor.dtype}; experts must be stored as F32, F16 or BF16, or quantized and "
                    "with a quantization_config in config.json, or ModelOpt's hf_quant_config.json beside it, that says how."
                )

    def _check_quantized(
        self, model: nn.Module, names: CheckpointNames, others: Iterable[tuple[StoredWeight, Target]]
    ) -> None:
        """Check that every quantized weight of the model can be decoded."""
        shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
        wrong, converted = [], []
        for layer in self._layers.values():
            for piece, weight in layer.stored.items():
                if weight.quantized:
                    wrong += weight.fit(layer.shapes(*piece))
        for weight, target in others:
            if weight.quantized and target.name in shapes:
                wrong += weight.fit([shapes[target.name]])
                converted += [] if self._is_read_alone(names, weight, target) else [weight.name]
        if wrong:
            raise KTModelError(
                f"{len(wrong)} tensors do not fit the quantization_config in config.json ({self.format.title}): {name_some(wrong, 3)}. "
                "Check that all shards are there and that config.json belongs to them."
            )
        self._check_values(weight for weight, target in others if weight.shape)
        if converted:
            raise KTModelError(
                f"{len(converted)} quantized weights are not loaded one by one by this model's class, which is not supported: "
                f"{name_some(converted, 3)}. Use the model's unquantized checkpoint."
            )

    def _check_values(self, weights: Iterable[StoredWeight]) -> None:
        """Check the values that headers do not tell, of weights that transformers reads: it would collect our errors into its own. Those
        of experts are checked while they are read."""
        read = opened()
        for weight in weights:
            if any(part in weight.parts for part in self.format.checked):
                weight.check_values({part: read(tensor) for part, tensor in weight.parts.items()})

    def _is_read_alone(self, names: CheckpointNames, weight: StoredWeight, target: Target) -> bool:
        """Whether transformers only renames a weight, and its parts likewise, so that the rules for the format find them. A prefix that
        it adds or takes away (``model.``, ``thinker.``) is so for the weight alone, whose name the rules give to the parts."""

        def same(part: str, mapped: Target) -> bool:
            wanted = self.format.stored_name(target.name, part)
            return not mapped.operations and (wanted.endswith(mapped.name) or mapped.name.endswith(f".{wanted}"))

        return (
            len(weight.shape) == 2
            and target.name.endswith(".weight")
            and all(same(part, names.target(tensor.name)) for part, tensor in weight.parts.items())
        )

    def unexpected(self) -> list[str]:
        """Regular expressions for the tensors that no parameter asks for when engines have taken the experts' place, by the names
        that transformers gives them."""
        return [
            *(rf"^({self._prefix}\.)?{re.escape(name.removeprefix(f'{self._prefix}.'))}\." for name in self._layers),
            *(f"{re.escape(ending)}$" for ending in self.format.unused),
        ]

    def names(self) -> dict[str, dict[str, Piece]]:
        """module -> weight of the checkpoint -> what it is of the module's experts."""
        layers = self._layers.items()
        return {name: {weight.name: piece for piece, weight in layer.stored.items()} for name, layer in layers}

    def layer(self, name: str) -> LayerTensors:
        """One module's tensors."""
        return self._layers[name]

    def after(self, module: ExpertsModule) -> ExpertsModule | None:
        """The next experts module, None after the last."""
        following = self.modules.index(module) + 1
        return self.modules[following] if following < len(self.modules) else None

    def stored(self, *, packed: bool) -> Stored:
        """How the experts' weights are stored for an engine.

        Args:
            packed: it takes quantized ones as they are.
        """
        if packed not in self._stored:
            layers = self._layers.values()
            self._stored[packed] = Stored(
                max(layer.itemsize(packed=packed) for layer in layers),
                all(layer.can_be_mapped(packed=packed) for layer in layers),
                sum(layer.converted(packed=packed) for layer in layers),
            )
        return self._stored[packed]

    def dtypes(self) -> set[str]:
        """How the experts are stored: safetensors' names, or the format's own such as ``INT4``."""
        return {weight.label for layer in self._layers.values() for weight in layer.weights()}


def _grouped(form: Format, files: Iterable[Path]) -> list[StoredWeight]:
    """All weights of a checkpoint, each with its parts."""
    weights: dict[str, StoredWeight] = {}
    for tensor in (tensor for file in files for tensor in stored_tensors(file)):
        name, part = form.split(tensor.name)
        weights.setdefault(name, StoredWeight(name, form)).parts[part] = tensor
    return list(weights.values())


def _place(layer: LayerTensors, weight: StoredWeight, target: Target) -> None:
    attribute, operations = target.name.rpartition(".")[2], target.operations
    shape = layer.module.shape
    firsts = [name for name in shape.projections if name != "down"]
    by_rows = attribute == "gate_up_proj" and shape.fused == USUAL  # dimension 1 has the rows of gate and up
    if operations in ([], ["Transpose"]):  # Transpose turns a fused tensor only if its shape asks for it
        layer.stored[attribute, None] = weight
    elif operations == ["Interleave"] and by_rows:
        layer.stored[attribute, None] = weight
        layer.interleaved = True
    elif operations == ["Concatenate"] and by_rows:
        layer.stored[firsts[target.source], None] = weight
    elif operations in (["MergeModulelist"], ["MergeModulelist", "Concatenate"]) and attribute in layer.module.weights:
        number = _NUMBER.search(weight.name)
        if number is None:
            raise KTModelError(f"{weight.file}: Unsupported weight naming scheme: {weight.name}.")
        projection = "down" if attribute == "down_proj" else firsts[target.source]
        layer.stored[projection, int(number[0])] = weight
    else:
        raise KTModelError(
            f"{weight.file}: Unsupported weight naming scheme: {weight.name} is converted by {' + '.join(operations)}."
        )


def _name(layer: LayerTensors, weight: str, expert: int | None) -> str:
    """The name that a missing tensor would have."""
    if expert is None:
        return f"{layer.module.name}.{weight}{'_proj' if weight in PROJECTIONS else ''}"
    example = next((stored for (projection, _), stored in layer.stored.items() if projection == weight), None)
    name = f"{layer.module.name}.{expert}.{weight}_proj.weight"
    return _NUMBER.sub(str(expert), example.name) if example else name
