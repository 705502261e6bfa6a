"""What a load would do with the experts: engine, files of its own, memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ...ground.errors import KTError, KTMemoryError, describe, name_some
from ...ground.machine import available_memory, gib
from .finding import Findings, error, ok, see

if TYPE_CHECKING:
    from ...adapters import AdapterSet
    from ...checkpoint.layout import CheckpointLayout
    from ...checkpoint.opening import MoEModel
    from ...engines.options import EngineOptions


def _packed(moe: MoEModel, layout: CheckpointLayout, backend: str, options: EngineOptions) -> Findings:
    """Let engines open the files that they would read in place of the checkpoint's experts."""
    from ...engines.options import EngineSpec
    from ...engines.registry import get_engine

    engine = get_engine(backend)
    try:
        for module in moe.experts:
            tensors = layout.layer(module.name)
            spec = EngineSpec(
                module.layer, module.shape, module.num_experts_per_tok, lora_rank=0,
                fingerprint=tensors.fingerprint, formula=module.formula, read_biases=tensors.biases,
            )  # fmt: skip
            engine(spec, tensors.experts, options)
    except KTError as problem:
        yield error("kt_weight_path", describe(problem), "INT8 and INT4 also quantize at each load, without the key.")
        return
    yield ok("kt_weight_path", f"{options.packed_files}: all layers, for {backend}")


def memory_of(args: Any, moe: MoEModel, adapters: Sequence[AdapterSet], layout: CheckpointLayout | None) -> Findings:
    """Choose engines as a load does, and add up the memory; without a layout, as most checkpoints are stored."""
    import torch

    from ...autotune.plan import candidates
    from ...checkpoint.discovery import formulas
    from ...integration.chat_config import experts_config
    from ...model.memory import placements, without_decoding

    config, gpus = experts_config(args), torch.cuda.device_count()
    request, computed = config.plan_request(on_gpu=gpus > 0), formulas(moe.experts)
    try:
        plans = candidates(config.backend, request, merged=config.merge_adapter, formulas=computed)
        plans = without_decoding(plans, layout, config)
    except KTError as problem:
        yield error(
            "experts", describe(problem), f"kt_backend: auto takes the fastest engine that can.{see('engines.md')}"
        )
        return
    try:
        places = placements(moe, layout, adapters, config, plans, on_gpu=gpus > 0)
    except KTMemoryError as problem:
        yield error(
            "CPU memory",
            describe(problem),
            f"llamafactory-kt estimate {args.model_name_or_path} compares precisions.{see('chat-guide.md#memory')}",
        )
        return
    plans = [plan for plan in plans if plan.backend in places]
    need, mapped = places[plans[0].backend].need, places[plans[0].backend].options.mapped
    layers = name_some([module.layer for module in moe.experts], 4)
    how = f"{plans[0]}" if len(plans) == 1 else f"the fastest of {'; '.join(map(str, plans))}"
    yield ok("experts", f"layers {layers} on the CPU; {how}")
    if config.weight_path and layout is not None:
        yield from _packed(moe, layout, plans[0].backend, places[plans[0].backend].options)
    free = available_memory()
    lora = f"their LoRA {gib(need.lora)}, " if need.lora else ""
    others = "" if gpus else f", everything else {gib(need.others)}"
    text = (
        f"about {gib(need.on_cpu)} while loading (experts {gib(need.experts)}, {lora}temporary buffers "
        f"{gib(need.loading)}{others}); {gib(free)} free"
    )
    yield ok("CPU memory", f"{text}; weights stay in the mapped files" if mapped else text)
    if gpus:
        free = sum(torch.cuda.mem_get_info(number)[0] for number in range(gpus))
        text = f"about {gib(need.others)} for everything but routed experts, plus a chat's KV cache; {gib(free)} free on {gpus} GPU(s)"
        advice = "Free GPU memory, use more GPUs, or hide them (CUDA_VISIBLE_DEVICES=)."
        yield error("GPU memory", text, advice) if need.others > free else ok("GPU memory", text)
