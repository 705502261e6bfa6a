"""What a model with its experts on the CPU will take, told by sizes alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

from torch import nn

from ..adapters import AdapterSet
from ..checkpoint.discovery import ExpertsModule
from ..engines.base import Engine, EngineOptions


@dataclass(frozen=True)
class MemoryNeed:
    """Bytes. Work buffers, PEFT's part of an adapter and the cache of a conversation come on top."""

    experts: int
    """base weights of all layers"""
    lora: int
    """the experts' LoRA"""
    loading: int
    """on top of all others while loading: the layer that is being read, or what is measured meanwhile"""
    others: int
    """everything but routed experts, wherever it goes"""
    on_gpu: bool
    """a GPU has the others"""

    @property
    def on_cpu(self) -> int:
        """The most that loading takes of the CPU's memory."""
        return self.experts + self.loading + self.lora + (0 if self.on_gpu else self.others)


def memory_need(
    model: nn.Module,
    experts: Sequence[ExpertsModule],
    adapters: AdapterSet,
    engine: type[Engine],
    options: EngineOptions,
    *,
    itemsize: int,
    on_gpu: bool,
) -> MemoryNeed:
    """Add up a model that is still empty.

    Args:
        adapters: whose LoRA the engine is to compute.
        itemsize: bytes of a weight in the checkpoint.
    """
    layers = [engine.memory(m.shape, adapters.rank(m.layer), itemsize, options) for m in experts]
    others = _others(model, experts)
    copying = 0 if on_gpu or options.mapped else max(others)
    return MemoryNeed(
        experts=sum(layer.weights for layer in layers),
        lora=sum(layer.lora for layer in layers),
        loading=max(copying, *(layer.loading for layer in layers)),
        others=0 if options.mapped and not on_gpu else sum(others),
        on_gpu=on_gpu,
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
    names = {f"{module.name}.{name}" for module in experts for name in (*module.weights, *module.biases)}
    return [p.nbytes for n, p in model.named_parameters() if n not in names]


def nbytes_by_device(model: nn.Module) -> dict[str, int]:
    """Bytes of parameters and buffers per device type."""
    sizes: Counter[str] = Counter()
    for tensor in chain(model.parameters(), model.buffers()):
        sizes[tensor.device.type] += tensor.nbytes
    return dict(sizes)
