"""What a model with its experts on the CPU will take, told by sizes alone; and whether its weights will be copied or stay in mapped files."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain

from torch import nn

from ..adapters import AdapterSet
from ..checkpoint.discovery import ExpertsModule
from ..checkpoint.layout import CheckpointLayout, Stored
from ..checkpoint.opening import MoEModel
from ..engines.base import Engine
from ..engines.options import EngineOptions
from ..engines.plan import Plan
from ..engines.registry import engines, get_engine
from ..ground.errors import KTMemoryError
from ..ground.machine import available_memory, gib
from .config import KTExpertsConfig

_FREE = 0.9
"""share of the free memory that copies may take where weights could stay mapped: a conversation needs some, too"""


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
    adapters: Sequence[AdapterSet],
    engine: type[Engine],
    options: EngineOptions,
    *,
    stored: Stored,
    on_gpu: bool,
) -> MemoryNeed:
    """Add up a model that is still empty.

    Args:
        adapters: those whose LoRA the engine is to compute, one of them at a time; all stay in memory.
        stored: as the engine reads them.
    """
    ranks = [[each.rank(m.layer) for each in adapters] or [0] for m in experts]
    layers = [engine.memory(m.shape, max(of), stored.itemsize, options) for m, of in zip(experts, ranks, strict=True)]
    loras = (
        engine.memory(m.shape, rank, stored.itemsize, options).lora
        for m, of in zip(experts, ranks, strict=True)
        for rank in of
    )
    others = _others(model, experts)
    copying = 0 if on_gpu or options.mapped else max(others)
    return MemoryNeed(
        experts=sum(layer.weights for layer in layers) + (stored.converted if options.mapped else 0),
        lora=sum(loras),
        loading=max(copying, *(layer.loading for layer in layers)),
        others=0 if options.mapped and not on_gpu else sum(others),
        on_gpu=on_gpu,
    )


def stored_for(engine: type[Engine], layout: CheckpointLayout | None, *, merged: bool) -> Stored:
    """How the experts' weights are stored for an engine; as in most checkpoints where that is not known."""
    return layout.stored(packed=engine.takes_packed and not merged) if layout is not None else Stored()


def without_decoding(plans: Sequence[Plan], layout: CheckpointLayout | None, config: KTExpertsConfig) -> list[Plan]:
    """The plans of engines that use quantized weights as they are, where there are any; otherwise all. They read a fraction of the bytes,
    and no others keep what was published."""
    if layout is None:
        return list(plans)

    def itemsize(plan: Plan) -> float:
        engine = get_engine(plan.backend)
        return stored_for(engine, layout, merged=engine.merges(config.merge_adapter)).itemsize

    return [plan for plan in plans if itemsize(plan) < layout.stored(packed=False).itemsize] or list(plans)


@dataclass(frozen=True)
class Placement:
    """Where an engine's weights will lie, and the memory that this takes."""

    options: EngineOptions
    need: MemoryNeed


def placements(
    opened: MoEModel,
    layout: CheckpointLayout | None,
    adapters: Sequence[AdapterSet],
    config: KTExpertsConfig,
    plans: Sequence[Plan],
    *,
    on_gpu: bool,
) -> dict[str, Placement]:
    """Decide for the engine of each plan, by its name; those for which there is too little memory are left out.

    Args:
        layout: of the checkpoint, None where it is not known.
        adapters: as in :func:`memory_need`.

    Raises:
        KTMemoryError: There is too little for each.
    """
    found, problem = {}, None
    for name in dict.fromkeys(plan.backend for plan in plans):
        try:
            found[name] = _place(get_engine(name), opened, layout, adapters, config, on_gpu=on_gpu)
        except KTMemoryError as error:
            problem = problem or error
    if problem is not None and not found:
        raise problem
    return found


def _place(
    engine: type[Engine],
    opened: MoEModel,
    layout: CheckpointLayout | None,
    adapters: Sequence[AdapterSet],
    config: KTExpertsConfig,
    *,
    on_gpu: bool,
) -> Placement:
    options, merged = config.options, engine.merges(config.merge_adapter)
    copied, mapped = (options, 1.0), (replace(options, mapped=True), 1.0)
    stored = stored_for(engine, layout, merged=merged)
    choices = {"copy": [copied], "mmap": [mapped], "auto": [(options, _FREE), mapped]}[config.load]
    if cannot_map(engine, stored, merged=merged, packed_files=options.packed_files is not None):
        choices = [copied]
    for choice, share in choices:
        need = memory_need(
            opened.model, opened.experts, () if merged else adapters, engine, choice,
            stored=stored, on_gpu=on_gpu,
        )  # fmt: skip
        if need.on_cpu <= share * (free := available_memory()):
            return Placement(choice, need)
    could = mapped not in choices and any(
        not (
            e.problem()
            or cannot_map(
                e, stored_for(e, layout, merged=config.merge_adapter), merged=config.merge_adapter, packed_files=False
            )
        )
        for e in engines()
    )
    raise KTMemoryError(
        f"The experts of {len(opened.experts)} layers need {gib(need.experts)}, with what loading takes and the rest of "
        f"the model {gib(need.on_cpu)}; {gib(free)} are free. Free memory, use a machine with more, or a smaller model"
        f"{'; or set kt_backend: native and kt_load: mmap, which reads the weights from the files, slowly' if could else ''}."
    )


def cannot_map(engine: type[Engine], stored: Stored, *, merged: bool, packed_files: bool) -> str:
    """Why the experts' weights cannot stay in the mapped files, those of ``kt_weight_path`` where there are any; empty if they can."""
    if not (engine.maps_packed_files if packed_files else engine.maps_weights):
        return f"{engine.name} keeps them in a layout of its own"
    if packed_files:
        return ""
    if merged:
        return "the adapter is merged into them"
    return "" if stored.can_be_mapped else "they are stored in another layout or dtype than they are multiplied in"


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
