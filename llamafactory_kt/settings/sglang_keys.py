"""The ``kt_*`` keys that only ``infer_backend: sglang`` reads, and the rules about them."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from ..engines.registry import AUTO
from .sglang_methods import ALIASES, BACKENDS, LORA_KERNELS, METHODS, SGLangMethod


@dataclass
class KTServingArguments:
    """Arguments pertaining to serving with SGLang and kt-kernel."""

    kt_method: str | None = field(
        default=None,
        metadata={
            "help": "SGLang: format of the experts' weights, as sglang-kt names it (BF16, AMXINT8, AMXINT4, ...). Default: from kt_backend."
        },
    )
    kt_cpuinfer: int | None = field(
        default=None,
        metadata={
            "help": "SGLang: CPU threads of kt-kernel. Default: kt_num_threads, else the physical cores, at most 60."
        },
    )
    kt_num_gpu_experts: int | None = field(
        default=None, metadata={"help": "SGLang: experts of each layer that stay on the GPU. Default: 0."}
    )
    kt_gpu_experts_ratio: float | None = field(
        default=None,
        metadata={"help": "SGLang: share of all experts that stay on the GPU (0 to 1), instead of kt_num_gpu_experts."},
    )
    kt_max_deferred_experts_per_token: int | None = field(
        default=None, metadata={"help": "SGLang: experts per token whose result may come one layer later."}
    )
    kt_moe_lora_rank: int | None = field(
        default=None, metadata={"help": "SGLang: the adapter's rank; only checked, since the adapter tells it."}
    )
    kt_moe_lora_alpha: float | None = field(
        default=None, metadata={"help": "SGLang: the adapter's alpha; only checked, since the adapter tells it."}
    )
    kt_moe_sft_method: str | None = field(
        default=None,
        metadata={"help": "SGLang: kernel for expert LoRA: AMXBF16_SFT, AMXINT8_SFT or AMXINT4_SFT; sets kt_method."},
    )
    kt_sglang_python: str | None = field(
        default=None,
        metadata={"help": "SGLang: the Python that has sglang-kt, if it is in another environment. Default: this one."},
    )
    kt_sglang_timeout: int = field(
        default=3600, metadata={"help": "SGLang: seconds until the server must be ready to answer."}
    )


SERVING_KEYS = tuple(f.name for f in fields(KTServingArguments))


def serves(args: Any) -> bool:
    """Whether the configuration asks for SGLang."""
    backend = getattr(args, "infer_backend", None)
    return getattr(backend, "value", backend) == "sglang"


def check_serving_values(args: Any) -> list[str]:
    """What is wrong with the values of these keys. The methods' names become sglang-kt's."""
    problems = []
    for name, least in (
        ("kt_cpuinfer", 1), ("kt_num_gpu_experts", 0), ("kt_max_deferred_experts_per_token", 0), ("kt_moe_lora_rank", 1),
        ("kt_sglang_timeout", 1),
    ):  # fmt: skip
        value = getattr(args, name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
            problems.append(f"{name} must be a whole number of at least {least}, found {value!r}.")
    for name, most in (("kt_gpu_experts_ratio", 1.0), ("kt_moe_lora_alpha", float("inf"))):
        value = getattr(args, name)
        if value is not None and (
            isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= most
        ):
            problems.append(
                f"{name} must be a number of at least 0{' and at most 1' if most == 1 else ''}, found {value!r}."
            )
    for name, known in (("kt_method", tuple(METHODS)), ("kt_moe_sft_method", tuple(LORA_KERNELS))):
        value = getattr(args, name)
        if value is None:
            continue
        plain = ALIASES.get(str(value).upper(), str(value).upper())
        if plain not in known:
            close = get_close_matches(plain, known, n=1)
            hint = f"; did you mean {close[0]}?" if close else "."
            problems.append(f"{name}: unknown value {value!r}, expected one of {', '.join(known)}{hint}")
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
    said = _methods_said(args)
    if len(set(said.values())) > 1:
        told = ", ".join(f"{key}: {getattr(args, key)} (weights in {method})" for key, method in said.items())
        problems.append(f"The format of the experts' weights is contradictory: {told}. Keep one.")
    elif not said and args.kt_weight_path:
        problems.append(
            "kt_weight_path says where the experts' weights are, but not in which format: add kt_method, one of "
            f"{', '.join(METHODS)}."
        )
    elif not args.kt_weight_path and (source := serving_method(args).weights_from):
        problems.append(
            f"kt_method: {serving_method(args).name} needs kt_weight_path, the directory with the experts' weights in that format; {source}."
        )
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
    if not (adapters or args.kt_moe_lora_path):
        problems += [
            f"{name}: there is no adapter whose {what} this could be; name it in adapter_name_or_path."
            for name, what in (("kt_moe_lora_rank", "rank"), ("kt_moe_lora_alpha", "alpha"))
            if getattr(args, name) is not None
        ]
    return problems


def _methods_said(args: Any) -> dict[str, str]:
    """Key -> the method it asks for, of the keys that were set."""
    said = {}
    if args.kt_method is not None:
        said["kt_method"] = args.kt_method
    if args.kt_moe_sft_method is not None:
        said["kt_moe_sft_method"] = LORA_KERNELS.get(args.kt_moe_sft_method, args.kt_moe_sft_method)
    if args.kt_backend in BACKENDS:
        said["kt_backend"] = BACKENDS[args.kt_backend]
    return said


def serving_method(args: Any) -> SGLangMethod:
    """The format of the experts' weights; BF16 if nothing was said."""
    return METHODS[next(iter(_methods_said(args).values()), "BF16")]
