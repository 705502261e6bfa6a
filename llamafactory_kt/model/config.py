"""``KTExpertsConfig``: what ``from_pretrained(..., quantization_config=...)`` takes to put the experts into an engine."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers.quantizers.auto import register_quantization_config
from transformers.utils.quantization_config import QuantizationConfigMixin

from ..engines.ktkernel.sub_pools import sub_pools
from ..engines.options import CACHES, DENSE, EngineOptions
from ..engines.plan import PlanRequest

QUANT_METHOD = "kt_experts"
DEFAULT_MAX_CHUNK = 512
DEFAULT_LORA_RANK = 16


@register_quantization_config(QUANT_METHOD)
@dataclass
class KTExpertsConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """Routed experts on the CPU. This is transformers' extension point for replacing modules; only the INT
    and AMXINT backends quantize.

    Args:
        backend: ``native`` (this package's kernels), ``INT8`` or ``INT4`` (the same on integers, quantized while loading or before), ``AMXBF16``, ``AMXINT8``, ``AMXINT4`` or ``AVX2BF16`` (kt-kernel), ``oneDNN`` (torch's
            own kernels), ``torch`` (float32 arithmetic, slow), or ``auto``: whichever of ``native`` and ``AMXBF16`` (with
            ``merge_adapter``, ``AVX2BF16``) is measured to be faster. ``oneDNN`` takes part where ``native`` does not run.
        num_threads: worker threads of kt-kernel; None measures what is fastest.
        threadpool_count: NUMA sub-pools the workers are divided into; None for what :func:`~llamafactory_kt.engines.ktkernel.sub_pools.sub_pools` says.
        weight_path: directory that ``llamafactory-kt quantize`` made. ``AMXINT8`` needs it; ``AMXINT4``, ``INT8`` and ``INT4`` pack the
            checkpoint's weights while loading without it. With ``INT8`` and ``INT4``, ``dense`` takes what it has of the others, too.
        idle_workers: whether kt-kernel's workers run in the idle scheduling class, beside torch's threads on all cores; None
            measures what is faster. Only where torch computes on the CPU too.
        recalibrate: measure engines and threads again, although this machine's times are known.
        load: ``mmap`` leaves weights in the checkpoint's mapped files, ``copy`` copies them into huge pages, ``auto`` copies where memory is
            free. Only ``native`` reads mapped weights, and ``INT8`` and ``INT4`` those of ``weight_path``.
        dense: ``int8`` or ``int4``: :func:`~llamafactory_kt.optimize_for_inference` quantizes the linear layers around the experts, too, with a
            scale for each 32 weights; ``same`` keeps the checkpoint's dtype. On the CPU, with the native kernels.
        cache: ``int8``: after :func:`~llamafactory_kt.optimize_for_inference`, keys and values of past tokens are kept in 8 bits, with a scale for each
            head's row; ``same`` keeps the model's dtype. On the CPU, with the native kernels. Latents (multi-head latent attention) stay.
        gpu_experts: with a GPU, how many of each layer's experts it computes, at the same time as the CPU the others: those that are used most
            while generating. ``auto``: as many as there is memory for. For ``native``, ``INT8``, ``INT4``, ``oneDNN`` and ``torch``; without
            ``compile``. Not yet run on a GPU.
        gpu_experts_path: ``stats.json`` of ``llamafactory-kt stats``, or its directory: what ``gpu_experts`` chooses by at first.
        max_chunk: tokens per call of kt-kernel; longer inputs are split.
        adapter: directory of the LoRA adapter to come, or several. They are checked against the model before weights
            are read, and the kernels get room for their ranks. They are not applied: that is ``apply_adapter``'s part.
        choices: adapters that may take its place later (:func:`~llamafactory_kt.apply.choose_adapter`), name -> directories. They are checked
            with it; there is memory and, in the kernels, room for all.
        moe_lora: a ``moe_lora.pt`` with the experts' part of the LoRA to come, alone or beside ``adapter``.
        lora_rank: room for LoRA in layers where ``adapter`` says nothing.
        merge_adapter: add the LoRA of ``adapter`` to the experts' weights while they are read, in float32, before they are
            packed. ``apply_adapter`` then merges the rest. ``AVX2BF16``, which computes no LoRA, always does that.
        resize_vocab: the embeddings will be resized before ``apply_adapter``, so ``adapter`` may have others than the checkpoint.
        router_stats: count what the routers choose; ``get_router_stats`` reads the counts.
        compile: let ``generate`` compile a token's step, as transformers does on a GPU for ``cache_implementation="static"``, into a CUDA graph
            that holds the experts. For ``native``, ``INT8`` and ``INT4``, without ``router_stats`` and ``debug``. Not yet run on a GPU.
        debug: let the kernel write to stdout, log where each step's time goes, and stop at NaN and Inf.
        debug_dir: with ``debug``, directory for a trace of the chosen experts and torch.profiler's of the first steps.

        checkpoint: the checkpoint's own ``quantization_config``. Loading fills it in.

    Example:
        >>> from transformers import AutoModelForCausalLM                          # doctest: +SKIP
        >>> model = AutoModelForCausalLM.from_pretrained(path, quantization_config=KTExpertsConfig())  # doctest: +SKIP
    """

    backend: str = "auto"
    num_threads: int | None = None
    threadpool_count: int | None = None
    weight_path: str | None = None
    idle_workers: bool | None = None
    recalibrate: bool = False
    load: str = "auto"
    dense: str = "same"
    cache: str = "same"
    gpu_experts: int | str = 0
    gpu_experts_path: str | None = None
    max_chunk: int = DEFAULT_MAX_CHUNK
    adapter: str | list[str] | None = None
    choices: dict[str, list[str]] | None = None
    moe_lora: str | None = None
    lora_rank: int = DEFAULT_LORA_RANK
    merge_adapter: bool = False
    resize_vocab: bool = False
    router_stats: bool = False
    compile: bool = False
    debug: bool = False
    debug_dir: str | None = None
    checkpoint: dict[str, Any] | None = None
    quant_method: str = QUANT_METHOD

    @property
    def pools(self) -> int:
        """NUMA sub-pools."""
        return self.threadpool_count or sub_pools(self.weight_path, self.num_threads)

    @property
    def options(self) -> EngineOptions:
        """What an engine is built with."""
        files = Path(self.weight_path) if self.weight_path else None
        return EngineOptions(
            self.pools,
            self.max_chunk,
            files,
            verbose=self.debug,
            dense_bits=DENSE.get(self.dense),
            cache_bits=CACHES.get(self.cache),
        )

    def plan_request(self, on_gpu: bool) -> PlanRequest:
        """What a plan must fit."""
        return PlanRequest(on_gpu, self.pools, self.num_threads, self.idle_workers, shared=bool(self.gpu_experts))
