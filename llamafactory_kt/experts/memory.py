"""What a model with its experts on the CPU will take, told by sizes alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from ..adapters import AdapterSet, ExpertsShape
from .contract import ExpertsModule
from .kernel import MULTIPLE, idle_bytes, padded


@dataclass(frozen=True)
class MemoryNeed:
    """Bytes. Work buffers, PEFT's part of an adapter and the cache of a conversation come on top."""

    experts: int
    """packed base weights of all layers"""
    lora: int
    """the experts' LoRA"""
    layer: int
    """the layer that is being read, on top of the packed ones, while loading"""
    others: int
    """everything but routed experts, wherever it goes"""
    reusable: int
    """what idle kernels of this process already hold for the experts"""

    def on_cpu(self, others_on_gpu: bool) -> int:
        """The most that loading takes of the CPU's memory."""
        return max(0, self.experts - self.reusable) + self.layer + self.lora + (0 if others_on_gpu else self.others)


def memory_need(
    model: nn.Module, experts: Sequence[ExpertsModule], adapters: AdapterSet, *, itemsize: int, pools: int
) -> MemoryNeed:
    """Add up a model that is still empty.

    Args:
        itemsize: bytes of a base weight in the engine.
        pools: NUMA sub-pools, over which each expert's intermediate size is divided.
    """

    def sizes(shape: ExpertsShape) -> tuple[int, int]:
        return padded(shape.hidden_size), padded(shape.intermediate_size, MULTIPLE * pools)

    packed = []
    for module in experts:
        hidden, intermediate = sizes(module.shape)
        packed.append(3 * module.shape.num_experts * hidden * intermediate * itemsize)
    names = {f"{module.name}.{weight}" for module in experts for weight in ("gate_up_proj", "down_proj")}
    return MemoryNeed(
        experts=sum(packed),
        lora=sum(
            3 * m.shape.num_experts * adapters.rank(m.layer) * (m.shape.hidden_size + m.shape.intermediate_size) * 2
            for m in experts
        ),
        layer=max(packed),
        others=sum(p.nbytes for n, p in model.named_parameters() if n not in names),
        reusable=idle_bytes(experts[0].shape.num_experts, *sizes(experts[0].shape)),
    )
