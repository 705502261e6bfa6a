"""What a model with its experts on the CPU will take, told by sizes alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from ..adapters import AdapterSet
from ..checkpoint.discovery import ExpertsModule
from ..engines.ktkernel.methods import METHODS, PackedShape
from ..engines.onednn.engine import sampled
from ..engines.onednn.lora import lora_size


@dataclass(frozen=True)
class MemoryNeed:
    """Bytes. Work buffers, PEFT's part of an adapter and the cache of a conversation come on top."""

    experts: int
    """packed base weights of all layers"""
    lora: int
    """the experts' LoRA"""
    loading: int
    """on top of all others while loading: the layer that is being read, or what is measured meanwhile"""
    others: int
    """everything but routed experts, wherever it goes"""

    def on_cpu(self, others_on_gpu: bool) -> int:
        """The most that loading takes of the CPU's memory."""
        return self.experts + self.loading + self.lora + (0 if others_on_gpu else self.others)


def memory_need(
    model: nn.Module,
    experts: Sequence[ExpertsModule],
    adapters: AdapterSet,
    *,
    backend: str,
    pools: int,
    itemsize: int,
    stored: bool = False,
) -> MemoryNeed:
    """Add up a model that is still empty.

    Args:
        backend: not ``auto``; ``torch`` keeps the checkpoint's weights, ``oneDNN`` has them in bfloat16.
        pools: NUMA sub-pools, over which each expert's intermediate size is divided.
        itemsize: bytes of a weight in the checkpoint.
        stored: the packed weights are read from ``kt_weight_path``, and not made from the checkpoint's.
    """
    weights = [3 * m.shape.num_experts * m.shape.hidden_size * m.shape.intermediate_size for m in experts]
    packed = [n * (2 if backend == "oneDNN" else itemsize) for n in weights]
    if (method := METHODS.get(backend)) is not None:
        packed = [PackedShape.of(method, m.shape, pools).nbytes for m in experts]
    others = _others(model, experts)
    loading = 0 if stored else max(weights) * itemsize
    ranks = [adapters.rank(module.layer) for module in experts]
    lora = [
        3 * m.shape.num_experts * rank * (m.shape.hidden_size + m.shape.intermediate_size) * 2
        for m, rank in zip(experts, ranks, strict=True)
    ]
    if backend == "oneDNN":  # takes one expert at a time, and measures with some of them, and with a large layer
        lora = [lora_size(module.shape, rank) for module, rank in zip(experts, ranks, strict=True)]
        loading = max(
            *(4 * sampled(m.shape) * size // m.shape.num_experts for m, size in zip(experts, packed, strict=True)),
            2 * max(others),
        )
    return MemoryNeed(
        experts=sum(packed),
        lora=sum(lora),
        loading=loading,
        others=sum(others),
    )


def read_around(model: nn.Module, experts: Sequence[ExpertsModule]) -> int:
    """Bytes of weights beside the experts that a token reads, of a model that is still empty: all but the embedding, which
    counts where it is the output layer too."""
    embedding: nn.Module = model.get_input_embeddings()  # type: ignore[operator]
    output: nn.Module | None = model.get_output_embeddings()  # type: ignore[operator]
    tied = output is not None and output.weight is embedding.weight
    return sum(_others(model, experts)) - (0 if tied else sum(p.nbytes for p in embedding.parameters()))


def _others(model: nn.Module, experts: Sequence[ExpertsModule]) -> list[int]:
    """Bytes of each parameter but routed experts'."""
    names = {f"{module.name}.{weight}" for module in experts for weight in ("gate_up_proj", "down_proj")}
    return [p.nbytes for n, p in model.named_parameters() if n not in names]
