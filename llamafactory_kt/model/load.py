"""Loading the experts of a model: everything is checked by headers first; then engines take the experts' place and are filled."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..adapters import AdapterSet, open_adapters
from ..autotune.choose import choose
from ..autotune.plan import candidates, left_out
from ..checkpoint.discovery import ExpertsModule, formulas
from ..checkpoint.expert_weights import ExpertWeights
from ..checkpoint.formats import check_file
from ..checkpoint.layout import CheckpointLayout
from ..checkpoint.opening import MoEModel
from ..engines import gpus
from ..engines.base import Engine
from ..engines.native.integer_files import open_dense
from ..engines.options import EngineOptions, EngineSpec
from ..engines.registry import canonical_name, get_engine
from ..ground.errors import KTConfigError, KTError
from ..ground.internals import untested
from ..ground.machine import usable_cores
from ..ground.paging import give_back_memory
from ..ground.process import require_own_process
from ..ground.progress import with_progress
from ..ground.tensors.safetensors_files import open_mapped
from ..native.cached_dense import CachedDense
from ..native.mapped import MappedFile, watch
from ..native.openmp import release_team
from ..native.packed import PackedExpert, Packing
from ..peft_side.swap import require_peft_layers
from ..settings.rules import experts_problems, no_gpu
from . import growing_cache
from .config import KTExpertsConfig
from .debug import Debugger
from .experts_module import KTExperts, PresortedExperts
from .guard import guard, traced_layer
from .memory import cannot_map, placements, read_around, stored_for, without_decoding
from .on_gpu.placement import GpuNeed, Placement, expert_itemsize
from .on_gpu.shared_overlap import SHARED_EXPERTS, SharedExpertsOverlap
from .on_gpu.split_experts import SplitExperts
from .on_gpu.transfer import HostTransfer
from .on_gpu.usage import read_usage
from .state import KTState, set_kt_state
from .untested import UntestedCheck

logger = logging.getLogger(__name__)


class ExpertsLoad:
    """One load. Building it reads no weight, changes nothing, and raises what would stop the load later.

    Args:
        model: still empty; its experts modules in place.
        files: the checkpoint's safetensors files.
        on_gpu: whether a GPU gets everything but the experts.

    Raises:
        KTError: Of the kind of what is wrong: configuration, model, adapter, kernel or memory.
    """

    def __init__(self, config: KTExpertsConfig, model: nn.Module, files: Sequence[str | Path], *, on_gpu: bool):
        require_own_process()
        _check_config(config)
        if on_gpu and config.options.dense_bits:
            raise KTConfigError(
                f"dense: {config.dense} is for models without a GPU: there the linear layers are on it. Set kt_dense: same."
            )
        if on_gpu and config.options.cache_bits:
            raise KTConfigError(f"cache: {config.cache} is for models without a GPU. Set kt_cache: same.")
        if config.options.cache_bits and not growing_cache.INTERNAL.usable:
            raise KTConfigError(
                f"cache: {config.cache} needs a version of transformers whose cache is known. Set kt_cache: same."
            )
        self._gpus = [device for device in gpus.visible() if on_gpu or device.type == "cpu"]
        if config.gpu_experts and not self._gpus:
            raise KTConfigError(no_gpu(f"gpu_experts: {config.gpu_experts}"))
        self._config, self._on_gpu = config, on_gpu
        for directory in {Path(file).parent for file in files}:
            check_file(directory)
        self._opened = opened = MoEModel(model, files)
        known = Path(config.gpu_experts_path).expanduser() if config.gpu_experts_path else None
        self._usage = read_usage(known, opened.experts)
        computed = formulas(opened.experts)
        plans = candidates(config.backend, config.plan_request(on_gpu), merged=config.merge_adapter, formulas=computed)
        layout, experts = opened.layout, opened.experts
        self.format = layout.format
        """of the checkpoint's weights"""
        self.unexpected = layout.unexpected()
        """see :meth:`CheckpointLayout.unexpected`"""
        self._adapters = open_adapters(config.adapter, config.moe_lora)
        require_peft_layers(opened.fit(self._adapters, finite=True, resizes=config.resize_vocab))
        self._choices = {name: self._open_choice(name, paths) for name, paths in (config.choices or {}).items()}
        around = 0 if on_gpu else read_around(model, experts) // len(experts)
        kept = without_decoding(plans, layout, config)
        decoding = ", ".join(dict.fromkeys(plan.backend for plan in plans if plan not in kept))
        places = placements(opened, layout, self._taking_turns, config, kept, on_gpu=on_gpu)
        self._plan, reason = choose(
            [plan for plan in kept if plan.backend in places],
            experts[0].shape,
            experts[0].num_experts_per_tok,
            config.options,
            around,
            config.recalibrate,
            computed[0],
        )
        too_large = ", ".join({plan.backend: None for plan in kept if plan.backend not in places})
        self._reason = "; ".join(filter(None, (
            reason or left_out(config.backend, merged=config.merge_adapter, formulas=computed),
            f"{decoding} would decode the weights" if decoding else "",
            f"no memory for {too_large}, which would copy the weights" if too_large else "",
        )))  # fmt: skip
        self._engine = engine = get_engine(self._plan.backend)
        self._merged = self._adapters if engine.merges(config.merge_adapter) else None
        self._check = UntestedCheck(opened, self._merged) if untested() else None
        options, need = places[engine.name].options, places[engine.name].need
        self._on_each_gpu = self._count_on_gpu(engine, layout, need.others) if config.gpu_experts else 0
        if config.load == "mmap" and not options.mapped:
            merged = self._merged is not None
            problem = cannot_map(
                engine,
                stored_for(engine, layout, merged=merged),
                merged=merged,
                packed_files=options.packed_files is not None,
            )
            logger.warning("kt_load: mmap: the experts' weights are copied, because %s.", problem)
        for file in opened.files:
            open_mapped(file)  # as transformers will: it may be larger than memory
        if engine.weights_dtype is torch.bfloat16 and layout.dtypes() != {"BF16"}:
            logger.warning(
                "The experts are stored as %s; %s computes them in bfloat16.", ", ".join(layout.dtypes()), engine.name
            )
        self._dense = None
        if options.packed_files is not None and options.dense_bits:
            self._dense = open_dense(options.packed_files, Packing(f"int{options.dense_bits}"), layout.renamed.values())
        self._plan, self._options = engine.start(self._plan, options)

    def _count_on_gpu(self, engine: type[Engine], layout: CheckpointLayout, others: int) -> int:
        model: Any = self._opened.model
        itemsize = expert_itemsize(engine, stored_for(engine, layout, merged=self._merged is not None), model.dtype)
        apart = self._taking_turns if self._merged is None else ()
        need = GpuNeed.of(model.config, self._opened.experts, apart, itemsize, others, model.dtype)
        most = max(module.shape.num_experts for module in self._opened.experts)
        return need.count(self._config.gpu_experts, most, self._gpus)

    def _open_choice(self, name: str, paths: Sequence[str]) -> AdapterSet:
        try:
            adapters = open_adapters(list(paths))
            require_peft_layers(self._opened.fit(adapters, finite=True, resizes=self._config.resize_vocab))
        except KTError as error:
            raise type(error)(f"kt_adapters: {name}: {error}") from error
        return adapters

    @property
    def _taking_turns(self) -> list[AdapterSet]:
        return list(dict.fromkeys([self._adapters, *self._choices.values()]))

    @property
    def _apart(self) -> AdapterSet:
        """The adapters whose LoRA the engines compute."""
        return self._adapters if self._merged is None else AdapterSet()

    def _room(self, layer: int) -> int:
        """The largest rank that a layer's experts will have."""
        return max(adapters.rank(layer) for adapters in self._taking_turns)

    def replace_experts(self) -> None:
        """Put engines, still empty, in place of the model's experts."""
        config, model = self._config, self._opened.model
        directory = Path(config.debug_dir).expanduser() if config.debug_dir else None
        debugger = Debugger(directory) if config.debug else None
        self._files: list[MappedFile] = []  # in which weights stay
        made = [self._make_engine(module, self._options) for module in self._opened.experts]
        transfers: dict[torch.cuda.Stream, HostTransfer] | None = {} if self._on_gpu else None
        self._wrappers = [
            self._replace(module, engine, debugger, transfers)
            for module, engine in zip(self._opened.experts, made, strict=True)
        ]
        placement = Placement() if config.gpu_experts else None
        lock = guard(model, config.router_stats, debugger, self._files, placement)
        for experts in self._wrappers:
            last = experts is self._wrappers[-1]
            experts.around_traced = functools.partial(traced_layer, lock, self._files if last else ())
        state = KTState(
            wrappers=self._wrappers, lock=lock, plan=self._plan, reason=self._reason,
            options=self._options, stored=", ".join(sorted(self._opened.layout.dtypes())), on_gpu=self._on_gpu, requested=self._adapters,
            choices=self._choices, merged=self._merged,
            placement=placement,
        )  # fmt: skip
        set_kt_state(model, state)
        self._state = state

    def _make_engine(self, module: ExpertsModule, options: EngineOptions) -> Engine:
        layout, merged = self._opened.layout, self._merged
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
            lora_rank=0 if merged is not None else self._room(module.layer) or self._config.lora_rank,
            lora_scaling=self._apart.scaling(module.layer), fingerprint=tensors.fingerprint, formula=module.formula,
            read_biases=tensors.biases, read_packed=read_packed,
        )  # fmt: skip
        return self._engine(spec, read, options)

    def _replace(
        self,
        module: ExpertsModule,
        engine: Engine,
        debugger: Debugger | None,
        transfers: dict[torch.cuda.Stream, HostTransfer] | None,
    ) -> KTExperts:
        """transfers: None where the model is on the CPU, and nothing crosses."""
        name, _, attribute = module.name.rpartition(".")
        block = self._opened.model.get_submodule(name)
        parts = map(block._modules.get, () if module.presorted else SHARED_EXPERTS)  # those do not get the same rows
        shared = next((part for part in parts if part is not None), None)
        overlap = SharedExpertsOverlap(shared) if transfers is not None and shared is not None else None
        experts = KTExperts(module, engine, self._config.router_stats, debugger, transfers, overlap)
        setattr(block, attribute, PresortedExperts(experts) if module.presorted else experts)
        vars(block)["_is_hf_initialized"] = True  # Qwen3-Omni's block would initialize the experts' weights
        if not hasattr(block, "num_experts"):  # which DeepSeek-V2's reads to choose by groups, and lacks before 5.16
            vars(block)["num_experts"] = experts.num_experts
        if debugger is not None:
            debugger.watch_router(block)
        return experts

    def fill(self) -> None:
        """Read the experts' weights, layer by layer."""
        sizes = [self._opened.layout.layer(module.name).nbytes for module in self._opened.experts]
        with _all_cores():
            for experts in with_progress(self._wrappers, sizes):
                experts.engine.load()
                give_back_memory()
        if self._state.placement is not None and self._on_each_gpu:
            self._place_on_gpus(self._state.placement)
        if self._dense is not None:
            blocks, renamed = self._dense.read(), self._opened.layout.renamed
            own = {name: blocks[tensor.name] for name, tensor in renamed.items() if tensor.name in blocks}
            self._state.cached_dense = CachedDense(self._opened.model, own)
        if self._options.mapped:
            packed = self._options.packed_files
            self._files += watch([*self._opened.files, *(packed.rglob("*.safetensors") if packed is not None else ())])
        if self._check is not None:
            model: Any = self._opened.model
            self._check.compare(self._wrappers[0].engine, model.dtype)
        release_team()

    def _place_on_gpus(self, placement: Placement) -> None:
        """Split the layers that are on a GPU, with room for the LoRA to come."""
        model: Any = self._opened.model
        for module, experts, usage in zip(self._opened.experts, self._wrappers, self._usage, strict=True):
            block = model.get_submodule(module.name.rpartition(".")[0])
            device = next((parameter.device for parameter in block.parameters()), model.device)
            if device in self._gpus:
                count = min(self._on_each_gpu, experts.num_experts)
                experts.split = SplitExperts(experts.engine, count, device, model.dtype, usage)
                placement.add(experts.split)


def _check_config(config: KTExpertsConfig) -> None:
    problems = experts_problems(
        canonical_name(config.backend), weight_path=config.weight_path, merge_adapter=config.merge_adapter,
        num_threads=config.num_threads, pools=config.pools, load=config.load, dense=config.dense, cache=config.cache,
        gpu_experts=config.gpu_experts, gpu_experts_path=config.gpu_experts_path,
    )  # fmt: skip
    if config.gpu_experts and config.compile:
        problems.append(
            "compile: True cannot be combined with gpu_experts: a CUDA graph would keep its first LoRA. Remove one."
        )
    if problems:
        raise KTConfigError(" ".join(problems))


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
