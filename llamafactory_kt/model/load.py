"""Loading the experts of a model as :mod:`.load_plan` has planned: engines take the experts' place, and are filled."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from ..checkpoint.discovery import ExpertsModule
from ..checkpoint.expert_weights import ExpertWeights
from ..engines.base import Engine
from ..engines.options import EngineSpec
from ..ground.machine import usable_cores
from ..ground.paging import give_back_memory
from ..ground.progress import with_progress
from ..native.cached_dense import CachedDense
from ..native.mapped import MappedFile, watch
from ..native.openmp import release_team
from ..native.packed import PackedExpert
from .debug import Debugger
from .experts_module import KTExperts, PresortedExperts
from .guard import guard, traced_layer
from .load_plan import LoadPlan
from .on_gpu.placement import Placement
from .on_gpu.shared_overlap import SHARED_EXPERTS, SharedExpertsOverlap
from .on_gpu.split_experts import SplitExperts
from .on_gpu.transfer import HostTransfer
from .state import KTState, set_kt_state

logger = logging.getLogger(__name__)


class ExpertsLoad:
    """One load, as it is planned."""

    def __init__(self, plan: LoadPlan):
        self._plan = plan
        self.format = plan.opened.layout.format
        """of the checkpoint's weights"""
        self.unexpected = plan.opened.layout.unexpected()
        """see :meth:`CheckpointLayout.unexpected`"""

    def replace_experts(self) -> None:
        """Put engines, still empty, in place of the model's experts."""
        plan, model = self._plan, self._plan.opened.model
        config = plan.config
        directory = Path(config.debug_dir).expanduser() if config.debug_dir else None
        debugger = Debugger(directory) if config.debug else None
        self._files: list[MappedFile] = []  # in which weights stay
        made = [self._make_engine(module) for module in plan.opened.experts]
        transfers: dict[torch.cuda.Stream, HostTransfer] | None = {} if plan.on_gpu else None
        self._wrappers = [
            self._replace(module, engine, debugger, transfers)
            for module, engine in zip(plan.opened.experts, made, strict=True)
        ]
        placement = Placement() if config.gpu_experts else None
        lock = guard(model, config.router_stats, debugger, self._files, placement)
        for experts in self._wrappers:
            last = experts is self._wrappers[-1]
            experts.around_traced = functools.partial(traced_layer, lock, self._files if last else ())
        state = KTState(
            wrappers=self._wrappers, lock=lock, plan=plan.engine_plan, reason=plan.reason, options=plan.options,
            stored=", ".join(sorted(plan.opened.layout.dtypes())), on_gpu=plan.on_gpu, requested=plan.adapters,
            choices=plan.choices, merged=plan.merged, placement=placement,
        )  # fmt: skip
        set_kt_state(model, state)
        self._state = state

    def _make_engine(self, module: ExpertsModule) -> Engine:
        plan = self._plan
        layout, merged = plan.opened.layout, plan.merged
        tensors = layout.layer(module.name)

        def read_ahead() -> None:  # these without self: a cycle outlives its model
            if (following := layout.after(module)) is not None:
                layout.layer(following.name).read_ahead()  # the disk works while this layer is packed

        def read_packed() -> Iterator[PackedExpert] | None:
            read_ahead()
            return tensors.packed_experts() if merged is None else None

        def read(dtype: torch.dtype | None) -> Iterator[ExpertWeights]:
            read_ahead()
            lora = merged.read_layer(module.layer, module.shape) if merged is not None else None
            return tensors.experts(dtype, lora)

        spec = EngineSpec(
            module.layer, module.shape, module.num_experts_per_tok,
            lora_rank=0 if merged is not None else plan.room(module.layer), lora_scaling=plan.apart.scaling(module.layer),
            fingerprint=tensors.fingerprint, formula=module.formula,
            read_biases=tensors.biases, read_packed=read_packed,
        )  # fmt: skip
        return plan.engine(spec, read, plan.options)

    def _replace(
        self,
        module: ExpertsModule,
        engine: Engine,
        debugger: Debugger | None,
        transfers: dict[torch.cuda.Stream, HostTransfer] | None,
    ) -> KTExperts:
        """transfers: None where the model is on the CPU, and nothing crosses."""
        name, _, attribute = module.name.rpartition(".")
        block = self._plan.opened.model.get_submodule(name)
        parts = map(block._modules.get, () if module.presorted else SHARED_EXPERTS)  # those do not get the same rows
        shared = next((part for part in parts if part is not None), None)
        overlap = SharedExpertsOverlap(shared) if transfers is not None and shared is not None else None
        experts = KTExperts(module, engine, self._plan.config.router_stats, debugger, transfers, overlap)
        setattr(block, attribute, PresortedExperts(experts) if module.presorted else experts)
        vars(block)["_is_hf_initialized"] = True  # Qwen3-Omni's block would initialize the experts' weights
        if not hasattr(block, "num_experts"):  # which DeepSeek-V2's reads to choose by groups, and lacks before 5.16
            vars(block)["num_experts"] = experts.num_experts
        if debugger is not None:
            debugger.watch_router(block)
        return experts

    def fill(self) -> None:
        """Read the experts' weights, layer by layer."""
        plan, opened, options = self._plan, self._plan.opened, self._plan.options
        sizes = [opened.layout.layer(module.name).nbytes for module in opened.experts]
        with _all_cores():
            for experts in with_progress(self._wrappers, sizes):
                experts.engine.load()
                give_back_memory()
        if self._state.placement is not None and plan.on_each_gpu:
            self._place_on_gpus(self._state.placement)
        if plan.dense is not None:
            blocks, renamed = plan.dense.read(), opened.layout.renamed
            own = {name: blocks[tensor.name] for name, tensor in renamed.items() if tensor.name in blocks}
            self._state.cached_dense = CachedDense(opened.model, own)
        if options.mapped:
            packed = options.packed_files
            self._files += watch([*opened.files, *(packed.rglob("*.safetensors") if packed is not None else ())])
        if plan.check is not None:
            model: Any = opened.model
            plan.check.compare(self._wrappers[0].engine, model.dtype)
        release_team()

    def _place_on_gpus(self, placement: Placement) -> None:
        """Split the layers that are on a GPU, with room for the LoRA to come."""
        plan = self._plan
        model: Any = plan.opened.model
        for module, experts, usage in zip(plan.opened.experts, self._wrappers, plan.usage, strict=True):
            block = model.get_submodule(module.name.rpartition(".")[0])
            device = next((parameter.device for parameter in block.parameters()), model.device)
            if device in plan.gpus:
                count = min(plan.on_each_gpu, experts.num_experts)
                experts.split = SplitExperts(experts.engine, count, device, model.dtype, usage)
                placement.add(experts.split)


@contextlib.contextmanager
def _all_cores() -> Iterator[None]:
    """Copying and packing take all cores, unless ``OMP_NUM_THREADS`` says otherwise."""
    before: Any = torch.get_num_threads()
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(usable_cores())
    try:
        yield
    finally:
        torch.set_num_threads(before)
