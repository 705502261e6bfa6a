"""Replaces a model's experts while transformers builds it: its quantizer extension point.

Before the weights are read, everything that can go wrong is checked on the empty model and the files' headers, and
each experts module is replaced, so transformers never reads the expert tensors. Afterwards the engines are filled
layer by layer.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.quantizers.auto import register_quantizer
from transformers.quantizers.base import HfQuantizer

from ..adapters import AdapterSet, open_adapters
from ..autotune.apply import arrange
from ..autotune.choose import choose
from ..autotune.plan import candidates
from ..checkpoint.discovery import ExpertsModule, find_experts
from ..checkpoint.fp8 import block_size
from ..checkpoint.layout import ExpertsCheckpoint
from ..checkpoint.reader import ExpertWeights
from ..decoding.attention import leave_out_cudnn, widen_values
from ..decoding.lm_head import straighten_last_token
from ..engines.base import Engine, EngineSpec
from ..engines.ktkernel.cpuinfer import settle_pool
from ..engines.ktkernel.engine import KTEngine
from ..engines.ktkernel.packed_files import StoredLayer, record_for
from ..engines.ktkernel.runtime import cpu_variant, kernel_problem
from ..engines.onednn.engine import OneDNNEngine
from ..engines.reference import TorchEngine
from ..engines.registry import canonical_backend
from ..ground.errors import KTConfigError, KTMemoryError, KTModelError
from ..ground.machine import available_memory, gib, usable_cores
from ..ground.paging import give_back_memory
from ..ground.process import require_own_process
from ..ground.progress import with_progress
from ..matmul.layouts import forget_measured
from ..matmul.openmp import release_team
from ..peft_side.split import check_peft_part
from .config import QUANT_METHOD, KTExpertsConfig
from .debug import Debugger
from .experts_module import KTExperts
from .fp8_rules import loading_rules
from .gpu_transfer import SHARED_EXPERTS, Crossing, EarlyShared
from .lock import guard
from .memory import memory_need, read_around

logger = logging.getLogger(__name__)


@register_quantizer(QUANT_METHOD)
class KTExpertsQuantizer(HfQuantizer):  # type: ignore[misc]
    """See the module's text. Sets ``model._kt_wrappers``: the :class:`KTExperts` modules in order; ``_kt_adapters``: the
    adapters that were checked, to be applied; ``_kt_merged``: the same where their expert LoRA is in the weights, else None;
    ``_kt_gate``: what keeps generations and an exchange of adapters apart."""

    quantization_config: KTExpertsConfig

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Is the checkpoint's format one that can be read?"""
        block_size(self.quantization_config)

    def get_weight_conversions(self) -> list[Any]:
        """How transformers reads all but the experts."""
        block = block_size(self.quantization_config)
        return loading_rules(block) if block is not None else []

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: list[str] | None = None, device_map: Any = None, **kwargs: Any
    ) -> None:
        require_own_process()
        config = self.quantization_config
        if config.weight_path and config.merge_adapter:
            raise KTConfigError(
                "merge_adapter cannot change packed weights that are read from weight_path. Merge the adapter into the "
                "checkpoint (llamafactory-kt merge) and quantise that, or leave merge_adapter out."
            )
        everything_on_cpu = device_map in (None, {"": "cpu"}, {"": torch.device("cpu")})
        self._on_gpu = on_gpu = torch.cuda.is_available() and not everything_on_cpu
        pools = config.pools
        plans = candidates(config, on_gpu)
        experts = find_experts(model)
        if not checkpoint_files:
            raise KTModelError(f"{type(model).__name__}: experts are read from checkpoint files, and there are none.")
        checkpoint = ExpertsCheckpoint(model, experts, checkpoint_files)
        shapes = {module.layer: module.shape for module in experts}
        adapters = open_adapters(config.adapter, config.moe_lora)
        adapters.check_fits(shapes)
        for adapter in adapters.adapters:
            check_peft_part(model, adapter)
        adapters.check_finite()
        first = experts[0]
        if config.recalibrate:
            forget_measured()
        self._plan, reason = choose(
            plans, first.shape, first.num_experts_per_tok, pools, config.max_chunk,
            0 if on_gpu else read_around(model, experts) // len(experts), config.recalibrate,
        )  # fmt: skip
        if canonical_backend(config.backend) == "auto" and not reason and (problem := kernel_problem()):
            reason = f"AMXBF16 cannot run: {problem}"
        method = self._plan.method
        self._merged = adapters if config.merge_adapter or (method is not None and not method.lora) else None
        apart = adapters if self._merged is None else AdapterSet()
        self._check_memory(model, checkpoint, apart, on_gpu)
        if self._plan.workers:
            workers, config.threadpool_count = settle_pool(self._plan.workers, pools)
            self._plan = replace(self._plan, workers=workers)
        if self._plan.backend in ("AMXBF16", "AVX2BF16", "oneDNN") and checkpoint.dtypes() != {"BF16"}:
            logger.warning(
                "The experts are stored as %s; %s computes them in bfloat16.",
                ", ".join(checkpoint.dtypes()), self._plan.backend,
            )  # fmt: skip
        directory = Path(config.debug_dir).expanduser() if config.debug_dir else None
        self._debugger = Debugger(directory) if config.debug else None
        engines = [self._engine(module, checkpoint, apart) for module in experts]
        crossings: dict[torch.cuda.Stream, Crossing] | None = {} if on_gpu else None
        self._wrappers = [
            self._replace(model, module, engine, crossings) for module, engine in zip(experts, engines, strict=True)
        ]
        self._sizes = [checkpoint.layer(module.name).nbytes for module in experts]
        model._kt_wrappers = self._wrappers
        model._kt_adapters = adapters
        model._kt_merged = self._merged
        model._kt_gate = guard(model, config.router_stats, self._debugger)
        model._kt_summary = {
            "engine": self._wrappers[0].engine.name,
            "variant": cpu_variant() if self._plan.method else "any",
            "plan": self._plan,
            "reason": reason,
            "pools": config.pools,
        }
        # transformers will find just these tensors unexpected, as no parameter asks for them any more.
        known = list(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or [])
        model._keys_to_ignore_on_load_unexpected = known + [
            f"^{re.escape(n)}$" for n in sorted(checkpoint.target_names)
        ]

    def _check_memory(
        self, model: nn.Module, checkpoint: ExpertsCheckpoint, adapters: AdapterSet, on_gpu: bool
    ) -> None:
        need = memory_need(
            model,
            checkpoint.modules,
            adapters,
            backend=self._plan.backend,
            pools=self.quantization_config.pools,
            itemsize=max(checkpoint.layer(module.name).dtype.itemsize for module in checkpoint.modules),
            stored=self.quantization_config.weight_path is not None,
        )
        if (needed := need.on_cpu(on_gpu)) > (free := available_memory()):
            raise KTMemoryError(
                f"The experts of {len(checkpoint.modules)} layers need {gib(need.experts)}, with what loading takes and the rest of "
                f"the model {gib(needed)}; {gib(free)} are free. Free memory, use a machine with more, or a smaller model."
            )

    def _engine(self, module: ExpertsModule, checkpoint: ExpertsCheckpoint, adapters: AdapterSet) -> Engine:
        config, method, merged = self.quantization_config, self._plan.method, self._merged
        spec = EngineSpec(
            module.layer, module.shape, module.num_experts_per_tok,
            lora_rank=0 if merged is not None else adapters.rank(module.layer) or config.lora_rank,
            lora_scaling=adapters.scaling(module.layer),
        )  # fmt: skip

        def read(dtype: torch.dtype | None) -> Iterator[ExpertWeights]:  # without self: a cycle outlives its model
            if (following := checkpoint.after(module)) is not None:
                checkpoint.layer(following.name).read_ahead()  # the disk works while this layer is packed
            lora = merged.read_layer(module.layer, module.shape) if merged is not None else None
            return checkpoint.layer(module.name).experts(dtype, lora)

        if method is None:
            return (OneDNNEngine if self._plan.backend == "oneDNN" else TorchEngine)(spec, read)
        pools, stored = config.pools, None
        if config.weight_path:
            record = record_for(module.shape, method, pools, checkpoint.layer(module.name).fingerprint())
            stored = StoredLayer(Path(config.weight_path), module.layer, record, method)
        return KTEngine(spec, read, method, stored, max_chunk=config.max_chunk, pools=pools, verbose=config.debug)

    def _replace(
        self,
        model: nn.Module,
        module: ExpertsModule,
        engine: Engine,
        crossings: dict[torch.cuda.Stream, Crossing] | None,
    ) -> KTExperts:
        """crossings: None where the model is on the CPU, and nothing crosses."""
        name, _, attribute = module.name.rpartition(".")
        parent = model.get_submodule(name)
        shared = next((part for part in map(parent._modules.get, SHARED_EXPERTS) if part is not None), None)
        early = EarlyShared(shared) if crossings is not None and shared is not None else None
        stats = self.quantization_config.router_stats
        experts = KTExperts(module, engine, stats, self._debugger, crossings, early)
        setattr(parent, attribute, experts)
        if self._debugger is not None:
            self._debugger.watch_router(parent)
        return experts

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        if "OMP_NUM_THREADS" not in os.environ:  # copying and packing take all cores; running is arranged afterwards
            torch.set_num_threads(usable_cores())
        for experts in with_progress(self._wrappers, self._sizes):
            experts.engine.load()
            give_back_memory()
        arrange(self._plan)
        release_team()
        straighten_last_token(model)
        widen_values(model)
        if self._on_gpu:
            leave_out_cudnn()
        return model

    def is_serializable(self) -> bool:
        return False

    @property
    def is_trainable(self) -> bool:
        return False
