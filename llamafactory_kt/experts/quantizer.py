"""Replaces a model's experts while transformers builds it: its quantizer extension point.

Before the weights are read, everything that can go wrong is checked on the empty model and the files' headers, and
each experts module is replaced, so transformers never reads the expert tensors. Afterwards the engines are filled
layer by layer.
"""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm
from transformers.quantizers.auto import register_quantizer
from transformers.quantizers.base import HfQuantizer

from ..adapters import AdapterSet, ExpertsShape, open_adapters
from ..backends import canonical_backend
from ..errors import KTMemoryError, KTModelError
from ..machine import available_memory, gib, give_back_memory
from ..peft_part import check_peft_part
from .checkpoint import ExpertsCheckpoint
from .config import QUANT_METHOD, KTExpertsConfig
from .contract import ExpertsModule, find_experts
from .debugging import Debugger
from .engine import Engine, EngineSpec
from .gate import guard
from .kernel import MULTIPLE, idle_bytes, padded
from .kt_engine import KTEngine
from .kt_runtime import choose_threads, cpu_variant, kernel_problem, require_kernel, share_cores
from .module import KTExperts
from .torch_engine import TorchEngine

logger = logging.getLogger(__name__)


@register_quantizer(QUANT_METHOD)
class KTExpertsQuantizer(HfQuantizer):  # type: ignore[misc]
    """See the module's text. Sets ``model._kt_wrappers``: the :class:`KTExperts` modules in order; ``_kt_adapters``: the
    adapters that were checked, to be applied; ``_kt_gate``: what keeps generations and an exchange of adapters apart."""

    quantization_config: KTExpertsConfig

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: list[str] | None = None, device_map: Any = None, **kwargs: Any
    ) -> None:
        config = self.quantization_config
        backend = _resolve_backend(config.backend)
        on_gpu = torch.cuda.is_available() and device_map not in (None, {"": "cpu"}, {"": torch.device("cpu")})
        threads = choose_threads(config.num_threads, config.threadpool_count, on_gpu)
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
        itemsize = 2 if backend != "torch" else max(checkpoint.dtype(module.name).itemsize for module in experts)
        self._check_memory(model, experts, adapters, on_gpu, itemsize)
        if backend != "torch":
            threads, config.threadpool_count = share_cores(threads, config.threadpool_count, on_gpu)
            if checkpoint.dtypes() != {"BF16"}:
                logger.warning(
                    "The experts are stored as %s; kt-kernel computes them in bfloat16.", ", ".join(checkpoint.dtypes())
                )
        directory = Path(config.debug_dir).expanduser() if config.debug_dir else None
        self._debugger = Debugger(directory) if config.debug else None
        self._wrappers = [self._replace(model, module, checkpoint, adapters, backend) for module in experts]
        self._sizes = {module.name: checkpoint.nbytes(module.name) for module in experts}
        model._kt_wrappers = self._wrappers
        model._kt_adapters = adapters
        model._kt_gate = guard(model, config.router_stats, self._debugger)
        model._kt_summary = {
            "engine": self._wrappers[0].engine.name,
            "variant": cpu_variant() if backend != "torch" else "any",
            "threads": threads if backend != "torch" else 0,
            "pools": config.threadpool_count,
        }
        # transformers will find just these tensors unexpected, as no parameter asks for them any more.
        known = list(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or [])
        model._keys_to_ignore_on_load_unexpected = known + [
            f"^{re.escape(n)}$" for n in sorted(checkpoint.target_names)
        ]

    def _check_memory(
        self, model: nn.Module, experts: list[ExpertsModule], adapters: AdapterSet, on_gpu: bool, itemsize: int
    ) -> None:
        pools = self.quantization_config.threadpool_count

        def packed(shape: ExpertsShape) -> int:
            hidden, intermediate = padded(shape.hidden_size), padded(shape.intermediate_size, MULTIPLE * pools)
            return 3 * shape.num_experts * hidden * intermediate * itemsize

        sizes = [packed(module.shape) for module in experts]
        shape = experts[0].shape
        reusable = idle_bytes(
            shape.num_experts, padded(shape.hidden_size), padded(shape.intermediate_size, MULTIPLE * pools)
        )
        names = {f"{module.name}.{weight}" for module in experts for weight in ("gate_up_proj", "down_proj")}
        others = 0 if on_gpu else sum(p.nbytes for n, p in model.named_parameters() if n not in names)
        lora = sum(
            3 * m.shape.num_experts * adapters.rank(m.layer) * (m.shape.hidden_size + m.shape.intermediate_size) * 2
            for m in experts
        )
        needed = max(0, sum(sizes) - reusable) + max(sizes) + lora + others
        free = available_memory()
        if needed > free:
            raise KTMemoryError(
                f"The experts of {len(experts)} layers need {gib(sum(sizes))}, with the layer being read and the rest of "
                f"the model {gib(needed)}; {gib(free)} are free. Free memory, use a machine with more, or a smaller model."
            )

    def _replace(
        self,
        model: nn.Module,
        module: ExpertsModule,
        checkpoint: ExpertsCheckpoint,
        adapters: AdapterSet,
        backend: str,
    ) -> KTExperts:
        config = self.quantization_config
        spec = EngineSpec(
            module.layer, module.shape, module.num_experts_per_tok,
            lora_rank=adapters.rank(module.layer) or config.lora_rank,
            lora_scaling=adapters.scaling(module.layer),
        )  # fmt: skip

        def read(dtype: torch.dtype | None, size: tuple[int, int]) -> Any:
            return checkpoint.read(module.name, dtype, size)

        engine: Engine
        if backend == "torch":
            engine = TorchEngine(spec, read)
        else:
            engine = KTEngine(
                spec, read, max_chunk=config.max_chunk, pools=config.threadpool_count, verbose=config.debug
            )
        experts = KTExperts(module, engine, config.router_stats, self._debugger)
        parent, _, attribute = module.name.rpartition(".")
        setattr(model.get_submodule(parent), attribute, experts)
        if self._debugger is not None:
            self._debugger.watch_router(model.get_submodule(parent))
        return experts

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        total = sum(self._sizes.values())
        with tqdm(total=total, unit="B", unit_scale=True, unit_divisor=1024, desc="Loading experts") as bar:
            for number, experts in enumerate(self._wrappers, start=1):
                bar.set_postfix_str(f"layer {number} of {len(self._wrappers)}", refresh=True)
                experts.engine.load()
                give_back_memory()
                bar.update(self._sizes[experts.info.name])
        return model

    def is_serializable(self) -> bool:
        return False

    @property
    def is_trainable(self) -> bool:
        return False


def _resolve_backend(name: str) -> str:
    backend = canonical_backend(name)
    if backend == "AMXBF16":
        require_kernel(backend)
    elif backend == "auto":
        backend = "AMXBF16"
        if problem := kernel_problem():
            logger.warning("kt_backend: auto falls back to plain torch, which is slow: %s.", problem)
            backend = "torch"
    return backend
