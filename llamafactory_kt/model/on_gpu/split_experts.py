"""A layer's experts on two devices: some on the one that its tokens are on, the others in the engine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ...adapters import ExpertLora
from ...engines.base import Engine, Undo
from ...engines.product import Product
from ...ground.errors import KTMemoryError
from .usage import Usage


@dataclass
class _Stack:
    """One projection of the experts on the device, a slot for each."""

    weight: torch.Tensor
    """[N, out, in]"""
    bias: torch.Tensor | None
    """[N, out] float32"""
    a: torch.Tensor | None = None
    """[N, r, in] float32; None without LoRA"""
    b: torch.Tensor | None = None
    """[N, out, r] float32"""

    def put(self, slot: int, product: Product) -> None:
        self.weight[slot].copy_(product.plain_weight(self.weight.dtype))
        if self.bias is not None and product.bias is not None:
            self.bias[slot].copy_(product.bias)
        self.put_lora(slot, product)

    def put_lora(self, slot: int, product: Product) -> None:
        for own, given in ((self.a, product.a), (self.b, product.b)):
            if own is not None and given is not None:
                own[slot].copy_(given)

    def multiply(self, x: torch.Tensor, slots: slice | torch.Tensor) -> torch.Tensor:
        """x [b, n, in] for the experts in b slots -> [b, n, out] float32. A slice of slots is not copied."""
        out = _product(x, self.weight[slots].mT)
        if self.bias is not None:
            out += self.bias[slots][:, None]
        if self.a is not None and self.b is not None:
            out = torch.baddbmm(out, torch.bmm(x.float(), self.a[slots].mT), self.b[slots].mT)
        return out


class SplitExperts:
    """Computes all of a layer's experts, as an engine does. Those on the device have the engine's own values, so that answers depend on
    where an expert is only by rounding: codes of quantized weights are decoded, and rounded once to the dtype that the model computes in.

    The formula is :class:`~llamafactory_kt.engines.reference.ReferenceEngine`'s: products are summed in float32, LoRA beside them.

    Args:
        engine: loaded; keeps the weights of all experts, and computes those that are not on the device.
        count: of experts on the device; at first those that have been used most.
        device: of the layer's hidden states.
        dtype: that quantized weights get.
        usage: of the experts so far; counts all that are computed from now on.

    Raises:
        KTMemoryError: The device has no memory for them.
    """

    def __init__(self, engine: Engine, count: int, device: torch.device, dtype: torch.dtype, usage: Usage):
        shape = engine.spec.shape
        self.engine, self.device, self.count = engine, device, count
        self.usage = usage
        self.experts: list[int | None] = [None] * count
        """of each slot; None where an expert could not be read"""
        with torch.inference_mode(False):  # a tensor made in that mode can only be written in it
            self._slots = torch.full((shape.num_experts,), -1, device="cpu")
            self._here = torch.zeros(shape.num_experts, dtype=torch.bool, device=device)
            self._stacks = {name: self._stack(engine.product(name, 0), dtype) for name in shape.projections}
            self._read_lora()
        self.place(usage.most_used(count))

    def _stack(self, like: Product, dtype: torch.dtype) -> _Stack:
        weight = like.plain_weight(dtype)
        bias = self._empty(weight.shape[0]) if like.bias is not None else None
        return _Stack(self._empty(*weight.shape, dtype=weight.dtype), bias)

    def _empty(self, *size: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        try:
            return torch.empty(self.count, *size, dtype=dtype, device=self.device)
        except torch.OutOfMemoryError as error:
            raise KTMemoryError(
                f"kt_gpu_experts: {self.device} has too little memory for {self.count} experts of layer {self.engine.spec.layer} with a LoRA of "
                f"rank {self.engine.lora_rank}. Load the model with fewer, or with this adapter and kt_gpu_experts: auto."
            ) from error

    def place(self, experts: Sequence[int]) -> None:
        """Put these experts on the device, in place of those there that are not among them; no generation may run. Where one cannot be
        read, it stays with the engine."""
        free = [slot for slot, expert in enumerate(self.experts) if expert not in experts]
        coming = [expert for expert in experts if expert not in self.experts]
        for slot, expert in zip(free, coming, strict=True):
            if (leaving := self.experts[slot]) is not None:
                self._here[leaving], self._slots[leaving], self.experts[slot] = False, -1, None
            for name, stack in self._stacks.items():
                stack.put(slot, self.engine.product(name, expert))
            self._here[expert], self._slots[expert], self.experts[slot] = True, slot, expert

    def set_lora(self, lora: ExpertLora | None) -> Undo:
        """As the engine's, for all experts.

        Raises:
            KTMemoryError: The device has no memory for it; everything is as it was.
        """
        before, placed, undo_engine = self._lora, [*self.experts], self.engine.set_lora(lora)

        def undo() -> None:
            undo_engine()
            if self.experts != placed:  # others have come to the device since
                self._read_lora()
                return
            for name, (a, b) in before.items():
                self._stacks[name].a, self._stacks[name].b = a, b

        try:
            self._read_lora()
        except BaseException:
            undo()
            raise
        return undo

    @property
    def _lora(self) -> dict[str, tuple[torch.Tensor | None, torch.Tensor | None]]:
        return {name: (stack.a, stack.b) for name, stack in self._stacks.items()}

    def _read_lora(self) -> None:
        """Take the engine's LoRA, in tensors of its own."""
        with torch.inference_mode(False):  # as in __init__
            for name, stack in self._stacks.items():
                like = self.engine.product(name, 0)
                stack.a = self._empty(*like.a.shape) if like.a is not None else None
                stack.b = self._empty(*like.b.shape) if like.b is not None else None
                for slot, expert in enumerate(self.experts):
                    if expert is not None:
                        stack.put_lora(slot, self.engine.product(name, expert))

    def forward(self, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """As :meth:`Engine.forward`, one device after the other."""
        marked = torch.where(self._slots[index] >= 0, ~index, index)
        out = self.engine.forward(hidden, marked, weights)
        here = self.compute(hidden.to(self.device), marked, weights.to(self.device))
        return out if here is None else (out + here.to(out.device)).to(hidden.dtype)

    def mark(self, index: torch.Tensor) -> torch.Tensor:
        """index [T, K] on the device, with ``~e`` for each expert ``e`` that is there: what the engine gets."""
        index = index.to(torch.int64)
        return torch.where(self._here[index], ~index, index)

    def compute(self, hidden: torch.Tensor, marked: torch.Tensor, weights: torch.Tensor) -> torch.Tensor | None:
        """The weighted sum of the experts on the device, [T, H] float32; None where no token has one.

        Args:
            hidden: [T, H] on the device; and weights [T, K].
            marked: [T, K] int64 on the CPU, as :meth:`mark` makes it.
        """
        self.usage.add(plain(marked))
        token, choice = (marked < 0).nonzero(as_tuple=True)
        if not len(token):
            return None
        slot = self._slots[~marked[token, choice]]
        if len(hidden) == 1:  # a token of an answer: all of its experts in the same few products
            places = torch.stack([choice, slot]).to(self.device)
            few = slice(int(slot[0]), int(slot[0]) + 1) if len(slot) == 1 else places[1]
            found = self._experts(hidden.expand(len(slot), 1, -1), few)
            return weights[:, places[0]].float() @ found[:, 0]
        order = slot.argsort(stable=True)
        slots, counts = slot[order].unique_consecutive(return_counts=True)
        places = torch.stack([token, choice])[:, order].to(self.device)
        out = torch.zeros(hidden.shape, dtype=torch.float32, device=self.device)
        for number, (own, chosen) in zip(slots.tolist(), places.split(counts.tolist(), 1), strict=True):
            found = self._experts(hidden[own][None], slice(number, number + 1))[0]
            out.index_add_(0, own, found * weights[own, chosen, None].float())
        return out

    def _experts(self, x: torch.Tensor, slots: slice | torch.Tensor) -> torch.Tensor:
        """x [b, n, H] for the experts in b slots -> [b, n, H] float32."""
        stacks = self._stacks
        up = stacks["up"].multiply(x, slots)
        gate = stacks["gate"].multiply(x, slots) if "gate" in stacks else up
        return stacks["down"].multiply(self.engine.spec.formula.activate(gate, up), slots)

    @property
    def lora_rank(self) -> int:
        return self.engine.lora_rank

    @property
    def nbytes(self) -> int:
        """On the device."""
        tensors = (t for stack in self._stacks.values() for t in (stack.weight, stack.bias, stack.a, stack.b))
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)


def plain(marked: torch.Tensor) -> torch.Tensor:
    """The experts' numbers of what :meth:`SplitExperts.mark` made, in a tensor of its own."""
    return torch.where(marked < 0, ~marked, marked)


def _product(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """x [b, n, in] and weight [b, in, out] -> [b, n, out], summed in float32 and not rounded. CUDA has that for bfloat16; elsewhere the
    factors are converted."""
    if weight.is_cuda and weight.dtype == torch.bfloat16:
        return torch.bmm(x.to(torch.bfloat16), weight, out_dtype=torch.float32)
    return torch.bmm(x.float(), weight.float())
