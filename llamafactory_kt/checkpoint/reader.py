"""Reading one layer's expert tensors from a checkpoint. Quantized weights are decoded on the way, or handed over as they are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import prod

import torch

from ..adapters import ExpertLora
from ..adapters.fused_layout import FusedLayout
from ..adapters.keys import PROJECTIONS
from ..ground.paging import drop_pages, prefetch_pages
from ..native.packed import PackedExpert, PackedWeight, Packing
from .discovery import ExpertsModule
from .expert_weights import ExpertBiases, ExpertWeights
from .formats import WHOLE, Shape
from .stored import StoredTensor, fingerprint, opened
from .stored_weight import StoredWeight

Piece = tuple[str, int | None]
"""of a layer's experts: (projection, expert), (projection, None) for all experts together, or (one of the module's ``weights`` or
``biases``, None)"""


@dataclass
class LayerTensors:
    """The tensors of one module's experts."""

    module: ExpertsModule
    stored: dict[Piece, StoredWeight] = field(default_factory=dict)
    """weights and biases"""
    split: bool = False
    """whether a quantizer has split fused weights, and no rule of transformers joins them"""
    interleaved: bool = False
    """whether the rows of gate and up take turns in the checkpoint alone, and transformers puts them in order (Inkling)"""

    @property
    def layout(self) -> FusedLayout:
        """Of the fused weights in the checkpoint."""
        own = self.module.shape.fused
        return replace(own, interleaved=own.interleaved or self.interleaved)

    @property
    def fused(self) -> bool:
        return any((weight, None) in self.stored for weight in self.module.weights)

    def of_expert(self, expert: int) -> list[Piece]:
        """The pieces that hold one expert's weights."""
        if not self.fused:
            return [(projection, expert) for projection in self.module.shape.projections]
        first, down = self.module.weights
        apart = [("gate", None), ("up", None)]  # gate and up of all experts in a tensor each (Step-3.7)
        return [*(apart if any(piece in self.stored for piece in apart) else [(first, None)]), (down, None)]

    def shapes(self, name: str, expert: int | None) -> list[Shape]:
        """The shapes that a piece may have in the checkpoint."""
        shape = self.module.shape
        if name in shape.projections:
            return [shape.projection(name) if expert is not None else (shape.num_experts, *shape.projection(name))]
        if name in self.module.biases:
            out, width = self.parameter(name.removesuffix("_bias"))
            return [(shape.num_experts, width if shape.fused.transposed else out)]
        out, width = self.parameter(name)
        return [(shape.num_experts, out, width), (shape.num_experts, width, out)]

    def weights(self) -> list[StoredWeight]:
        """All but the biases."""
        return [weight for (name, _), weight in self.stored.items() if name not in self.module.biases]

    def tensors(self) -> list[StoredTensor]:
        """All parts of weights and biases."""
        return [part for weight in self.stored.values() for part in weight.parts.values()]

    @property
    def nbytes(self) -> int:
        """On disk."""
        return sum(tensor.nbytes for tensor in self.tensors())

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights in memory, bfloat16 for quantized ones; float32 where they differ."""
        stored = {weight.dtype for weight in self.weights()}
        return stored.pop() if len(stored) == 1 else torch.float32

    @property
    def is_row_major(self) -> bool:
        """Whether each row of gate, up and down lies in the files as it is multiplied, quantized or not."""
        return not any(
            weight.turned ^ (expert is None and name not in PROJECTIONS and self._is_turned(name, weight))
            for (name, expert), weight in self.stored.items()
            if name not in self.module.biases
        )

    def _is_turned(self, name: str, weight: StoredWeight) -> bool:
        """Whether a fused weight has the shape [in, out]."""
        return (weight.sizes != self.parameter(name)) ^ self.layout.transposed

    @cached_property
    def packing(self) -> Packing | None:
        """How the native kernels can use all weights as they are, told by headers; None if they must be decoded."""
        found = {weight.packing for weight in self.weights()}
        packing = found.pop()
        if found or packing is None or not self.is_row_major:
            return None
        halves = (
            self.layout.rows(2 * self.module.shape.intermediate_size) if ("gate_up_proj", None) in self.stored else ()
        )
        together = packing.rows_together
        return packing if together == 1 or not any(r.start % together or r.step for r in halves) else None

    def itemsize(self, *, packed: bool) -> float:
        """Bytes of a weight in memory.

        Args:
            packed: where the kernels can, as it is.
        """
        if not packed or self.packing is None:
            return self.dtype.itemsize
        return self._packed_nbytes / self.module.shape.num_weights

    def can_be_mapped(self, *, packed: bool) -> bool:
        """Whether the weights can stay in the files, but for :meth:`converted` bytes."""
        if packed and self.packing is not None:
            return all(weight.in_place for weight in self.weights())
        plain = len({weight.dtype for weight in self.weights()}) == 1 and not any(w.quantized for w in self.weights())
        return plain and self.is_row_major

    def converted(self, *, packed: bool) -> int:
        """Bytes of weights in the files that are in memory all the same, because they are stored in another way."""
        if not packed or self.packing is None:
            return 0
        return self._packed_nbytes - sum(weight.in_place for weight in self.weights())

    @cached_property
    def _packed_nbytes(self) -> int:
        assert self.packing is not None
        return sum(prod(weight.shape[:-2]) * self.packing.nbytes(*weight.rows) for weight in self.weights())

    def fingerprint(self) -> str:
        """What tells these weights from others, see :func:`~.stored.fingerprint`."""
        return fingerprint(self.tensors())

    def by_name(self, experts: Sequence[int]) -> dict[str, torch.Tensor]:
        """Read some experts' weights in float32, as transformers' rules expect them; fused ones with these experts alone, also those that
        a quantizer has split."""
        get = opened()

        def read(weight: StoredWeight, expert: int | None) -> torch.Tensor:
            parts = {part: get(tensor) for part, tensor in weight.parts.items()}
            if expert is not None:
                parts = {part: tensor[expert] for part, tensor in parts.items()}
            return weight.decode(parts, torch.float32)

        def joined(name: str, expert: int) -> torch.Tensor:
            shape, layout = self.module.shape, self.module.shape.fused
            weight = read(self.stored["down" if name == "down_proj" else "up", expert], None)
            if name != "down_proj" and shape.has_gate:
                weight = layout.join(read(self.stored["gate", expert], None), weight, 0)
            return weight.T if layout.transposed else weight

        if self.split:
            names = self.module.weights
            return {f"{self.module.name}.{name}": torch.stack([joined(name, n) for n in experts]) for name in names}
        return {
            weight.name: torch.stack([read(weight, number) for number in experts])
            if expert is None else read(weight, None)
            for (_, expert), weight in self.stored.items()
            if expert is None or expert in experts
        }  # fmt: skip

    def experts(self, dtype: torch.dtype | None = None, lora: ExpertLora | None = None) -> Iterator[ExpertWeights]:
        """Read the experts one after the other, every tensor once.

        Use or copy an expert's weights before the next one: they may be views of the mapped file, whose pages are then dropped
        from resident memory.

        Args:
            dtype: to convert to; None keeps the checkpoint's (bfloat16 for quantized ones).
            lora: to merge: each weight becomes ``W + scaling * B @ A``, summed in float32 and rounded once.
        """
        dtype = dtype or self.dtype
        first = dtype if lora is None else torch.float32
        for expert, own in enumerate(self._read()):
            plain = self.canonical({name: weight.decode(pages, first) for name, (weight, pages) in own.items()})
            weights = [plain[projection] for projection in PROJECTIONS]
            if lora is not None:
                weights = [w + lora.delta(p, expert) for w, p in zip(weights, PROJECTIONS, strict=True)]
            yield ExpertWeights(*(weight.to(dtype) for weight in weights))

    def packed_experts(self) -> Iterator[PackedExpert] | None:
        """As :meth:`experts`, as the native kernels use weights without decoding them; None where they cannot.

        Raises:
            KTModelError: While reading: scales are not finite.
        """
        get = opened()
        packing = self.packing
        if packing is None or not all(weight.can_pack(get, packing) for weight in self.weights()):
            return None
        return (
            self._packed_expert({name: weight.packed(pages, packing) for name, (weight, pages) in own.items()})
            for own in self._read()
        )

    def _packed_expert(self, own: Mapping[str, PackedWeight]) -> PackedExpert:
        """From one expert's part of its pieces, by their names."""
        plain = {name.removesuffix("_proj"): weight for name, weight in own.items()}
        if "gate_up" in plain:
            both = plain.pop("gate_up")
            plain["gate"], plain["up"] = (both[rows] for rows in self.layout.rows(both.shape[0]))
        return PackedExpert(**{"gate": plain["up"][:0], **plain})

    def biases(self) -> ExpertBiases | None:
        """Read the biases, where the formula has any."""
        module = self.module
        if not module.biases:
            return None
        get = opened()
        first, down = (get(self.stored[name, None].parts[WHOLE]).float() for name in module.biases)
        shape = module.shape
        gate, up = shape.fused.split(first, 1) if shape.has_gate else (first[:, :0], first)
        return ExpertBiases(*(bias.contiguous() for bias in (gate, up, down)))

    def read_ahead(self) -> None:
        """Have the system read the tensors into its page cache in the background."""
        get = opened()
        for tensor in self.tensors():
            prefetch_pages(get(tensor))

    def _read(self) -> Iterator[dict[str, tuple[StoredWeight, dict[str, torch.Tensor]]]]:
        """Each expert's pieces by their names, with their parts as mapped tensors; the pages are dropped when the next one is asked for."""
        get = opened()
        for expert in range(self.module.shape.num_experts):
            own = {}
            for name, number in self.of_expert(expert):
                weight = self.stored[name, number]
                parts = {part: get(tensor) for part, tensor in weight.parts.items()}
                own[name] = weight, {part: t[expert] for part, t in parts.items()} if number is None else parts
            yield own
            for _, pages in own.values():
                for tensor in pages.values():
                    drop_pages(tensor)

    def canonical(self, own: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """gate, up and down as [out, in], from one expert's part of its pieces, by their names. Fused weights are stored like the model's
        parameters, or, in older checkpoints, the other way round."""
        layout, plain = self.layout, {}
        for name, weight in own.items():
            if name in PROJECTIONS:
                plain[name] = weight
                continue
            parameter = weight if weight.shape == self.parameter(name) else weight.T
            value = parameter.T if layout.transposed else parameter
            if name == "gate_up_proj":
                plain["gate"], plain["up"] = layout.split(value, 0)
            else:
                plain[name.removesuffix("_proj")] = value
        return {"gate": plain["up"][:0], **plain}

    def parameter(self, name: str) -> tuple[int, int]:
        """The sizes of one expert's part of a fused weight, as the model stores it."""
        shape = self.module.shape
        out, width = shape.projection("down" if name == "down_proj" else "up")
        return shape.fused.stored(2 * out if name == "gate_up_proj" else out, width)
