"""The ``kt_*`` keys that only ``infer_backend: sglang`` reads, and the rules about them."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from ..engines.registry import AUTO
from .sglang_methods import ALIASES, BACKENDS, LORA_KERNELS, METHODS, SGLangMethod
from .values import key, suggestion, type_problems


@dataclass
class KTServingArguments:
    """Arguments pertaining to serving with SGLang and kt-kernel."""

    kt_method: str | None = key(
        None,
        "SGLang: format of the experts' weights, as sglang-kt names it (BF16, AMXINT8, AMXINT4, ...). Default: from kt_backend.",
    )
    kt_cpuinfer: int | None = key(
        None, "SGLang: CPU threads of kt-kernel. Default: kt_num_threads, else the physical cores, at most 60."
    )
    kt_num_gpu_experts: int | None = key(None, "SGLang: experts of each layer that stay on the GPU. Default: 0.")
    kt_gpu_experts_ratio: float | None = key(
        None, "SGLang: share of all experts that stay on the GPU (0 to 1), instead of kt_num_gpu_experts."
    )
    kt_max_deferred_experts_per_token: int | None = key(
        None, "SGLang: experts per token whose result may come one layer later."
    )
    kt_moe_lora_rank: int | None = key(None, "SGLang: the adapter's rank. Only checked against the adapter.")
    kt_moe_lora_alpha: float | None = key(None, "SGLang: the adapter's alpha. Only checked against the adapter.")
    kt_moe_sft_method: str | None = key(
        None, "SGLang: kernel for expert LoRA: AMXBF16_SFT, AMXINT8_SFT or AMXINT4_SFT; sets kt_method."
    )
    kt_sglang_python: str | None = key(
        None, "SGLang: the Python that has sglang-kt, if it is in another environment. Default: this one."
    )
    kt_sglang_timeout: int = key(3600, "SGLang: seconds to wait until the server is ready.")


SERVING_KEYS = tuple(f.name for f in fields(KTServingArguments))


def infer_backend(args: Any) -> str:
    """LLaMA-Factory's ``infer_backend``, which is an enum or a string."""
    backend = getattr(args, "infer_backend", "huggingface")
    return str(getattr(backend, "value", backend))


def serves(args: Any) -> bool:
    """Whether the configuration asks for SGLang."""
    return infer_backend(args) == "sglang"


def check_serving_values(args: Any) -> list[str]:
    """What is wrong with the values of these keys. Method names are replaced by sglang-kt's spelling."""
    problems = type_problems(args, KTServingArguments)
    for name, known in (("kt_method", METHODS), ("kt_moe_sft_method", LORA_KERNELS)):
        value = getattr(args, name)
        if value is None:
            continue
        plain = ALIASES.get(str(value).upper(), str(value).upper())
        if plain not in known:
            expected = f"expected one of {', '.join(known)}{suggestion(plain, known)}"
            problems.append(f"{name}: unknown value {value!r}, {expected}")
        setattr(args, name, plain)
    python = args.kt_sglang_python
    if python is not None and not (isinstance(python, str) and Path(python).expanduser().is_file()):
        problems.append(
            f"kt_sglang_python must be the path of a Python interpreter, for example /opt/sglang/bin/python; found {python!r}."
        )
    return problems


def check_serving_combinations(args: Any) -> list[str]:
    """Keys that contradict each other, and what SGLang with KT cannot do."""
    problems = []
    if args.kt_backend not in (AUTO, *BACKENDS):
        problems.append(
            f"kt_backend: {args.kt_backend} is an engine of infer_backend: huggingface; SGLang computes with kt-kernel. Use "
            f"one of {', '.join(BACKENDS)}, or remove it."
        )
    if args.kt_method in (None, *METHODS) and args.kt_moe_sft_method in (None, *LORA_KERNELS):
        problems += _format_problems(args)
    if args.kt_num_threads is not None and args.kt_cpuinfer not in (None, args.kt_num_threads):
        problems.append(f"kt_num_threads is {args.kt_num_threads}, but kt_cpuinfer {args.kt_cpuinfer}; keep one.")
    if args.kt_gpu_experts_ratio is not None and args.kt_num_gpu_experts is not None:
        problems.append("kt_num_gpu_experts and kt_gpu_experts_ratio say the same in two ways; keep one.")
    if args.kt_lora_scope != "all":
        problems.append("kt_lora_scope: attention works with infer_backend: huggingface only; remove it.")
    adapters = getattr(args, "adapter_name_or_path", None) or []
    if len(adapters) > 1:
        problems.append(
            f"SGLang with KT serves one adapter, found {len(adapters)}: {', '.join(adapters)}. Merge all but one into the "
            "model (llamafactory-kt merge)."
        )
    if args.kt_adapters:
        problems.append(
            "kt_adapters works with infer_backend: huggingface only: SGLang with KT serves one adapter, which it loads when it starts. Remove "
            "it, or run a server for each."
        )
    if not (adapters or args.kt_moe_lora_path):
        problems += [
            f"{name}: there is no adapter whose {what} this could be; name it in adapter_name_or_path."
            for name, what in (("kt_moe_lora_rank", "rank"), ("kt_moe_lora_alpha", "alpha"))
            if getattr(args, name) is not None
        ]
    return problems


def _format_problems(args: Any) -> list[str]:
    requested, method = _requested_methods(args), serving_method(args)
    if len(set(requested.values())) > 1:
        found = ", ".join(f"{name}: {getattr(args, name)} (weights in {wanted})" for name, wanted in requested.items())
        return [f"The format of the experts' weights is contradictory: {found}. Keep one."]
    if args.kt_weight_path and not requested:
        return [
            "kt_weight_path says where the experts' weights are, but not in which format: add kt_method, one of "
            f"{', '.join(METHODS)}."
        ]
    if method.weights_from and not args.kt_weight_path:
        return [
            f"kt_method: {method.name} needs kt_weight_path, the directory with the experts' weights in that format; "
            f"{method.weights_from}."
        ]
    return []


def _requested_methods(args: Any) -> dict[str, str]:
    """Each key that sets a method -> that method."""
    requested = {
        "kt_method": args.kt_method,
        "kt_moe_sft_method": LORA_KERNELS.get(args.kt_moe_sft_method),
        "kt_backend": BACKENDS.get(args.kt_backend),
    }
    return {name: method for name, method in requested.items() if method is not None}


def serving_method(args: Any) -> SGLangMethod:
    """The format of the experts' weights. Default: BF16."""
    return METHODS[next(iter(_requested_methods(args).values()), "BF16")]
