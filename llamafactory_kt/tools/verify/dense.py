"""Everything but the routed experts: without adapters it is the checkpoint's, bit for bit; with them each module computes what PEFT makes
of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ...adapters import Adapter, AdapterSet
from ...adapters.keys import MLP_TARGETS, split_module
from ...apply import switch_adapter
from ...checkpoint.opening import open_checkpoint
from ...engines.bounds import Bounds
from ...ground.tensors.stores import SafetensorsStore
from ...model.experts_module import KTExperts
from ...model.state import kt_state, plain_model
from ...peft_side.model_names import CheckpointNames, ModuleNames, tied_weights
from ...peft_side.split import input_embeddings, weight_of
from .compare import Comparison, compare
from .peft_reading import read_by_peft
from .probe import Probe

_FLOATS = {"BF16", "F16", "F32", "F64"}
_ROUNDING = Bounds(relative=0.005)
"""one rounding to bfloat16, of each weight or of each output, is off by up to 2**-9"""


@dataclass(frozen=True)
class ModuleResult:
    """The comparison of one module that the adapters change."""

    name: str
    comparison: Comparison


@dataclass(frozen=True)
class DenseResult:
    """What :func:`verify_dense` found."""

    modules: list[ModuleResult]
    """those that the adapters change"""
    base: int
    """weights that were compared with the files, without adapters; 0 where those are merged into the weights"""
    differing: list[str]
    """those of them that are not the files'"""

    @property
    def problems(self) -> list[str]:
        """One line for each thing that is wrong."""
        wrong = [f"{found.name}: {found.comparison.problem}" for found in self.modules if found.comparison.problem]
        return wrong + [f"{name}: without the adapter it is not the checkpoint's" for name in self.differing]


@dataclass
class _Module:
    """A module that adapters change."""

    probe: Probe
    base: torch.Tensor
    """what it should compute without adapters"""
    change: torch.Tensor
    """what they should add to that"""
    found: list[torch.Tensor] = field(default_factory=list)
    """what the model computes: with adapters, and without them, unless they are merged"""


class CheckpointWeights:
    """The parameters of a model, but for its experts, as the checkpoint's files have them."""

    def __init__(self, directory: Path):
        moe = open_checkpoint(directory, quantized=True)
        self._names = CheckpointNames(moe.model)
        inside = tuple(f"{module.name}." for module in moe.experts)
        self._sources: dict[str, list[tuple[SafetensorsStore, str]]] = {}
        for store in map(SafetensorsStore, moe.files):
            for name in store.infos:
                target = self._names.target(name).name
                if not target.startswith(inside):
                    self._sources.setdefault(target, []).append((store, name))

    def read(self, parameter: str) -> torch.Tensor | None:
        """The parameter as it is stored; None where the files do not have it as floating-point numbers."""
        sources = self._sources.get(parameter, [])
        if not sources or any(store.infos[name].dtype not in _FLOATS for store, name in sources):
            return None
        return self._names.converted({name: store.read(name) for store, name in sources}).get(parameter)


def verify_dense(model: Any, directory: Path, adapters: AdapterSet, scope: str = "all") -> DenseResult:
    """Compare; no generation may run. The adapters are taken off meanwhile, unless they are merged into the weights.

    Args:
        model: loaded with KT experts, its adapters applied.
        directory: the checkpoint.
        scope: as ``kt_lora_scope``.
    """
    files, plain = CheckpointWeights(directory), plain_model(model)
    merged = kt_state(model).merged is not None
    modules: dict[str, _Module] = {}
    for adapter in adapters.adapters:
        _add_wanted(modules, plain, files, adapter, scope)
    for module in modules.values():
        module.found.append(module.probe.of_model())
    base, differing = 0, list[str]()
    if not merged:
        with _without_adapters(model, adapters, scope):
            for module in modules.values():
                module.found.append(module.probe.of_model())
            base, differing = _compare_base(plain, files)
    return DenseResult([_compare(name, module) for name, module in modules.items()], base, differing)


def _add_wanted(
    modules: dict[str, _Module], plain: Any, files: CheckpointWeights, adapter: Adapter, scope: str
) -> None:
    """Add what PEFT makes of one adapter."""
    names, ties = ModuleNames(plain), tied_weights(plain)
    trained = {str(names.find(name)): name for name in (split_module(tensor)[0] for tensor in adapter.other_names)}
    for weight in [f"{module}.weight" for module in trained]:  # what is one weight with these changes, too
        for other in (name.removesuffix(".weight") for name in ties.get(weight, ())):
            trained.setdefault(other, other)
    with_lora = {split_module(tensor)[0] for tensor in adapter.other_names if ".lora_" in tensor}
    rows = adapter.settings.trainable_token_indices
    tokens = {row for part in (rows.values() if isinstance(rows, dict) else [rows]) for row in part}
    base = _base_reader(plain, files)
    probes = {module: Probe(plain, module, tokens) for module in trained}
    copies = {module: probe.copy(base, trained[module] in with_lora) for module, probe in probes.items()}

    source = input_embeddings(plain).removesuffix(".weight")
    tied = {name.removesuffix(".weight") for name in ties.get(f"{source}.weight", ())} & trained.keys()
    skeleton = {trained[module]: deepcopy(copy) for module, copy in copies.items()}
    tensors = {name: adapter.read(name) for name in adapter.other_names}
    embeddings = (trained[source], {trained[output]: trained[source] for output in tied}) if source in trained else ()
    read = read_by_peft(adapter.settings, tensors, skeleton, *embeddings)
    for module, probe in probes.items():
        if scope == "attention" and module.rpartition(".")[2] in MLP_TARGETS:
            continue
        own = probe.of_copy(copies[module])
        change = probe.of_copy(read.get_submodule(trained[module])) - own
        if module in modules:
            change = modules[module].change + change
        modules[module] = _Module(probe, own, change)


def _base_reader(plain: Any, files: CheckpointWeights) -> Any:
    own = kt_state(plain).own_weights

    def read(name: str) -> torch.Tensor:
        current = own.get(name, weight_of(plain, name)).detach()
        stored = files.read(name)
        # of quantized weights and resized embeddings, the model's own
        return (stored if stored is not None and stored.shape == current.shape else current).float().cpu()

    return read


def _compare(name: str, module: _Module) -> ModuleResult:
    together = module.base + module.change
    if len(module.found) == 1:  # merged: base and effect cannot be told apart
        return ModuleResult(name, compare((module.found[0],) * 2, (together,) * 2, _ROUNDING))
    found, alone = module.found
    return ModuleResult(name, compare((alone, found), (module.base, together), _ROUNDING))


@contextmanager
def _without_adapters(model: Any, adapters: AdapterSet, scope: str) -> Iterator[None]:
    if not adapters.adapters:
        yield
        return
    switch_adapter(model, None)
    try:
        yield
    finally:
        switch_adapter(model, adapters, scope)


def _compare_base(plain: Any, files: CheckpointWeights) -> tuple[int, list[str]]:
    """How many of the model's weights could be compared with the files, and which differ in any bit."""
    inside = tuple(f"{name}." for name, module in plain.named_modules() if isinstance(module, KTExperts))
    count, differing = 0, []
    for name, weight in (*plain.named_parameters(), *plain.named_buffers()):
        stored = files.read(name) if not name.startswith(inside) else None
        if stored is None or stored.shape != weight.shape:
            continue
        count += 1
        if not torch.equal(stored.to(weight.dtype), weight.cpu()):
            differing.append(name)
    return count, differing
