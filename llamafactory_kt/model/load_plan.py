"""What a load will do, decided by headers and sizes alone: its adapters, its engine, and where weights will lie."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..adapters import AdapterSet, open_adapters
from ..autotune.choose import choose
from ..autotune.plan import candidates, left_out
from ..checkpoint.discovery import formulas
from ..checkpoint.formats import check_file
from ..checkpoint.opening import MoEModel
from ..engines import gpus
from ..engines.native.integer_files import DenseRecord, IntegersFile, open_dense
from ..engines.plan import Plan
from ..engines.registry import canonical_name, get_engine
from ..ground.errors import KTConfigError, KTError
from ..ground.internals import untested
from ..ground.process import require_own_process
from ..ground.tensors.safetensors_files import open_mapped
from ..native.packed import Packing
from ..peft_side.swap import require_peft_layers
from ..settings.rules import experts_problems, no_gpu
from . import growing_cache
from .config import KTExpertsConfig
from .memory import Placement, cannot_map, placements, read_around, stored_for, without_decoding
from .on_gpu.placement import GpuNeed, expert_itemsize
from .on_gpu.usage import read_usage
from .untested import UntestedCheck

logger = logging.getLogger(__name__)


class LoadPlan:
    """Building it reads no weight, changes nothing, and raises what would stop the load later.

    Args:
        model: still empty; its experts modules in place.
        files: the checkpoint's safetensors files.
        on_gpu: whether a GPU gets everything but the experts.

    Raises:
        KTError: Of the kind of what is wrong: configuration, model, adapter, kernel or memory.
    """

    def __init__(self, config: KTExpertsConfig, model: nn.Module, files: Sequence[str | Path], *, on_gpu: bool):
        require_own_process()
        self.config, self.on_gpu = config, on_gpu
        self.gpus = [device for device in gpus.visible() if on_gpu or device.type == "cpu"]
        """devices that may get experts"""
        self._check_config()
        for directory in {Path(file).parent for file in files}:
            check_file(directory)
        self.opened = MoEModel(model, files)
        known = Path(config.gpu_experts_path).expanduser() if config.gpu_experts_path else None
        self.usage = read_usage(known, self.opened.experts)
        """how often each layer's experts were used"""
        self._formulas = formulas(self.opened.experts)
        plans = candidates(
            config.backend, config.plan_request(on_gpu), merged=config.merge_adapter, formulas=self._formulas
        )
        self.adapters = self._checked(open_adapters(config.adapter, config.moe_lora))
        self.choices = {name: self._open_choice(name, paths) for name, paths in (config.choices or {}).items()}
        chosen, place = self._choose(plans)
        self.engine = get_engine(chosen.backend)
        self.merged = self.adapters if self.engine.merges(config.merge_adapter) else None
        """adapters that become part of the experts' weights"""
        self.check = UntestedCheck(self.opened, self.merged) if untested() else None
        self.on_each_gpu = self._count_on_gpu(place.need.others) if config.gpu_experts else 0
        """most experts of a layer that a GPU gets"""
        self._warn_of_copies(place)
        for file in self.opened.files:
            open_mapped(file)  # as transformers will: it may be larger than memory
        self.dense = self._open_dense(place)
        """linear layers that were quantized before"""
        self.engine_plan, self.options = self.engine.start(chosen, place.options)

    def _check_config(self) -> None:
        config = self.config
        problems = experts_problems(
            canonical_name(config.backend), weight_path=config.weight_path, merge_adapter=config.merge_adapter,
            num_threads=config.num_threads, pools=config.pools, load=config.load, dense=config.dense, cache=config.cache,
            gpu_experts=config.gpu_experts, gpu_experts_path=config.gpu_experts_path,
        )  # fmt: skip
        if config.gpu_experts and config.compile:
            problems.append(
                "compile: True cannot be combined with gpu_experts: a CUDA graph would keep its first LoRA. Remove one."
            )
        if problems:  # dense and cache may be words that nobody knows
            raise KTConfigError(" ".join(problems))
        if self.on_gpu and config.options.dense_bits:
            problems.append(
                f"dense: {config.dense} is for models without a GPU: there the linear layers are on it. Set kt_dense: same."
            )
        if self.on_gpu and config.options.cache_bits:
            problems.append(f"cache: {config.cache} is for models without a GPU. Set kt_cache: same.")
        elif config.options.cache_bits and not growing_cache.INTERNAL.usable:
            problems.append(
                f"cache: {config.cache} needs a version of transformers whose cache is known. Set kt_cache: same."
            )
        if config.gpu_experts and not self.gpus:
            problems.append(no_gpu(f"gpu_experts: {config.gpu_experts}"))
        if problems:
            raise KTConfigError(" ".join(problems))

    def _checked(self, adapters: AdapterSet) -> AdapterSet:
        require_peft_layers(self.opened.fit(adapters, finite=True, resizes=self.config.resize_vocab))
        return adapters

    def _open_choice(self, name: str, paths: Sequence[str]) -> AdapterSet:
        try:
            return self._checked(open_adapters(list(paths)))
        except KTError as error:
            raise type(error)(f"kt_adapters: {name}: {error}") from error

    @property
    def taking_turns(self) -> list[AdapterSet]:
        """All that requests may choose among, the configured one first."""
        return list(dict.fromkeys([self.adapters, *self.choices.values()]))

    @property
    def apart(self) -> AdapterSet:
        """The adapters whose LoRA the engine computes."""
        return self.adapters if self.merged is None else AdapterSet()

    def room(self, layer: int) -> int:
        """The largest rank that a layer's experts will have."""
        return max(adapters.rank(layer) for adapters in self.taking_turns) or self.config.lora_rank

    def _choose(self, plans: Sequence[Plan]) -> tuple[Plan, Placement]:
        config, opened = self.config, self.opened
        around = 0 if self.on_gpu else read_around(opened.model, opened.experts) // len(opened.experts)
        kept = without_decoding(plans, opened.layout, config)
        places = placements(opened, opened.layout, self.taking_turns, config, kept, on_gpu=self.on_gpu)
        first = opened.experts[0]
        chosen, reason = choose(
            [plan for plan in kept if plan.backend in places], first.shape, first.num_experts_per_tok, config.options,
            around, config.recalibrate, self._formulas[0],
        )  # fmt: skip
        decoding = ", ".join(dict.fromkeys(plan.backend for plan in plans if plan not in kept))
        too_large = ", ".join(dict.fromkeys(plan.backend for plan in kept if plan.backend not in places))
        self.reason = "; ".join(filter(None, (
            reason or left_out(config.backend, merged=config.merge_adapter, formulas=self._formulas),
            f"{decoding} would decode the weights" if decoding else "",
            f"no memory for {too_large}, which would copy the weights" if too_large else "",
        )))  # fmt: skip
        """why this engine"""
        return chosen, places[chosen.backend]

    def _count_on_gpu(self, others: int) -> int:
        model: Any = self.opened.model
        stored = stored_for(self.engine, self.opened.layout, merged=self.merged is not None)
        itemsize = expert_itemsize(self.engine, stored, model.dtype)
        apart = self.taking_turns if self.merged is None else ()
        need = GpuNeed.of(model.config, self.opened.experts, apart, itemsize, others, model.dtype)
        most = max(module.shape.num_experts for module in self.opened.experts)
        return need.count(self.config.gpu_experts, most, self.gpus)

    def _warn_of_copies(self, place: Placement) -> None:
        merged, layout = self.merged is not None, self.opened.layout
        if self.config.load == "mmap" and not place.options.mapped:
            stored = stored_for(self.engine, layout, merged=merged)
            packed = place.options.packed_files is not None
            problem = cannot_map(self.engine, stored, merged=merged, packed_files=packed)
            logger.warning("kt_load: mmap: the experts' weights are copied, because %s.", problem)
        if self.engine.weights_dtype is torch.bfloat16 and (dtypes := layout.dtypes()) != {"BF16"}:
            logger.warning(
                "The experts are stored as %s; %s computes them in bfloat16.",
                ", ".join(sorted(dtypes)),
                self.engine.name,
            )

    def _open_dense(self, place: Placement) -> IntegersFile[DenseRecord] | None:
        files, bits = place.options.packed_files, place.options.dense_bits
        if files is None or not bits:
            return None
        return open_dense(files, Packing(f"int{bits}"), self.opened.layout.renamed.values())
