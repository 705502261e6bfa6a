"""Every rule about the ``kt_*`` keys of a configuration for chatting, checked before anything is loaded."""

from __future__ import annotations

import logging
import os
from dataclasses import fields
from typing import Any

from ..autotune.plan import candidates
from ..engines.plan import PlanRequest
from ..engines.registry import AUTO, backend_names, canonical_name
from ..ground.errors import KTConfigError, KTError, KTKernelError, KTPathError
from ..ground.machine import numa_nodes
from .adapter_choice import choice_problems, read_choices
from .keys import CHAT_ONLY_KEYS, SCOPES, KTArguments, threadpool_count
from .rules import experts_problems
from .sglang_keys import SERVING_KEYS, check_serving_combinations, check_serving_values, infer_backend, serves
from .upstream_keys import dictionary, translate, two_values
from .values import suggestion, type_problems

logger = logging.getLogger(__name__)


def check_for_inference(args: Any) -> None:
    """Check the kt_* keys of a configuration for chatting, and everything else that is known before the load.

    ``args`` is LLaMA-Factory's ModelArguments extended by :class:`KTArguments`. Its fields are normalised: ``kt_backend`` is
    spelled as in :func:`~llamafactory_kt.engines.registry.backend_names`, ``kt_num_threads`` is an int or None, ``kt_adapters`` as
    :func:`~.adapter_choice.read_choices` returns it, and ``kt_config`` is merged into the others.

    Raises:
        KTConfigError: With all mistakes at once.
        KTPathError: The only mistakes are paths that do not exist.
        KTKernelError: The only mistake is a kernel that this CPU cannot run.
    """
    problems = _merge_kt_config(args) + _check_values(args) + _check_combinations(args)
    if not problems and not serves(args):
        problems += _check_machine(args)
    missing = _check_paths(args)
    if problems:
        if len(problems) == 1 and not missing and isinstance(problems[0], KTError):
            raise problems[0]
        lines = "\n".join(f"- {problem}" for problem in [*problems, *missing])
        raise KTConfigError(f"Invalid KTransformers configuration:\n{lines}")
    if missing:
        raise KTPathError("\n".join(missing))
    for name in CHAT_ONLY_KEYS if serves(args) else SERVING_KEYS:
        if getattr(args, name) != KTArguments.__dataclass_fields__[name].default:
            logger.warning("%s does nothing with infer_backend: %s.", name, "sglang" if serves(args) else "huggingface")


def _merge_kt_config(args: Any) -> list[str]:
    try:
        nested = dictionary(args.kt_config)
    except KTConfigError as error:
        return [str(error)]
    defaults = {f.name: f.default for f in fields(KTArguments) if f.name not in ("use_kt", "kt_config")}
    ours, problems = translate(args, nested)
    for key, (source, value) in ours.items():
        if key not in defaults:
            problems.append(f"{key}: unknown key{suggestion(str(key), defaults)}")
            continue
        current = getattr(args, key)
        if current not in (defaults[key], value) and str(current).lower() != str(value).lower():
            problems.append(two_values(key, current, source, value))
        setattr(args, key, value)
    args.kt_config = None
    return problems


def _check_values(args: Any) -> list[str]:
    problems = type_problems(args, KTArguments)
    try:
        args.kt_backend = canonical_name(args.kt_backend)
    except KTConfigError as error:
        problems.append(str(error))
    for name in ("kt_load", "kt_dense", "kt_cache"):
        setattr(args, name, str(getattr(args, name)).lower())
    args.kt_adapters, wrong = read_choices(args.kt_adapters)
    problems += wrong
    threads = args.kt_num_threads
    if threads is None or str(threads).lower() == "auto":
        args.kt_num_threads = None
    elif isinstance(threads, bool) or not str(threads).isdecimal() or int(threads) < 1:
        problems.append(f"kt_num_threads must be a positive whole number or auto, found {threads!r}.")
    else:
        args.kt_num_threads = int(threads)
    if (on_gpu := str(args.kt_gpu_experts).lower()) == AUTO or on_gpu.isdecimal():
        args.kt_gpu_experts = on_gpu if on_gpu == AUTO else int(on_gpu)
    if not isinstance(args.kt_lora_scope, str) or args.kt_lora_scope.lower() not in SCOPES:
        problems.append(f"kt_lora_scope: unknown value {args.kt_lora_scope!r}, expected {' or '.join(SCOPES)}.")
    else:
        args.kt_lora_scope = args.kt_lora_scope.lower()
    return problems + (check_serving_values(args) if serves(args) else [])


def _check_combinations(args: Any) -> list[str]:
    problems = []
    pools = args.kt_threadpool_count
    if args.kt_tp_enabled is False and isinstance(pools, int) and pools > 1:
        problems.append(f"kt_tp_enabled: false means one sub-pool, but kt_threadpool_count is {pools}.")
    if args.kt_backend in backend_names():  # an unknown name has been reported
        problems += experts_problems(
            args.kt_backend if not serves(args) else AUTO,
            weight_path=args.kt_weight_path if not serves(args) else None,
            merge_adapter=args.kt_merge_adapter,
            num_threads=args.kt_num_threads if isinstance(args.kt_num_threads, int) else None,
            pools=pools if isinstance(pools, int) else None,
            load=args.kt_load,
            dense=args.kt_dense,
            cache=args.kt_cache,
            gpu_experts=args.kt_gpu_experts or 0 if not serves(args) else 0,
            gpu_experts_path=args.kt_gpu_experts_path if not serves(args) else None,
            prefix="kt_",
        )
    if (backend := infer_backend(args)) not in ("huggingface", "sglang"):
        problems.append(
            f"infer_backend: {backend} does not work with use_kt; use infer_backend: huggingface, or sglang for many users."
        )
    if serves(args) and args.kt_gpu_experts:
        problems.append(
            f"kt_gpu_experts: {args.kt_gpu_experts} is for infer_backend: huggingface; with SGLang, set kt_num_gpu_experts or "
            "kt_gpu_experts_ratio."
        )
    for name in ("kt_num_gpu_experts", "kt_gpu_experts_ratio"):
        if not serves(args) and (value := getattr(args, name)):
            problems.append(f"{name}: {value} is for infer_backend: sglang; with huggingface, set kt_gpu_experts.")
    for name in ("quantization_bit", "mixture_of_depths"):
        if getattr(args, name, None) is not None:
            problems.append(f"{name}: {getattr(args, name)} cannot be combined with use_kt; remove it.")
    if getattr(args, "export_dir", None):
        problems.append(
            "export_dir: a model with KT experts cannot be exported. llamafactory-kt merge --model M --adapter A --output DIR "
            "writes the checkpoint with the whole adapter merged."
        )
    if args.kt_prompt_cache_dir and not args.kt_prompt_cache:
        problems.append("kt_prompt_cache_dir needs kt_prompt_cache: true.")
    if args.kt_debug_dir and not args.kt_debug:
        problems.append("kt_debug_dir needs kt_debug: true.")
    if getattr(args, "use_unsloth", False):
        problems.append("use_unsloth: true cannot be combined with use_kt; remove it.")
    adapters = getattr(args, "adapter_name_or_path", None)
    if isinstance(adapters, list) and len(adapters) > 1 and args.kt_moe_lora_path:
        problems.append(
            f"kt_moe_lora_path goes with one adapter, but adapter_name_or_path names {len(adapters)}: {', '.join(adapters)}."
        )
    return problems + (check_serving_combinations(args) if serves(args) else choice_problems(args))


def _check_paths(args: Any) -> list[str]:
    from ..adapters import adapter_looks_local, looks_local

    missing = []
    model = args.model_name_or_path
    if looks_local(model) and not os.path.isdir(os.path.expanduser(model)):
        missing.append(f"model_name_or_path: {model} does not exist or is not a directory.")
    choices = args.kt_adapters if isinstance(args.kt_adapters, dict) else {}
    given = {"adapter_name_or_path": args.adapter_name_or_path or []}
    given |= {f"kt_adapters: {name}": paths for name, paths in choices.items()}
    for source, adapters in given.items():
        for adapter in adapters:
            if adapter_looks_local(adapter) and not os.path.exists(os.path.expanduser(adapter)):
                missing.append(f"{source}: {adapter} does not exist.")
    if isinstance(args.kt_weight_path, str) and not os.path.isdir(os.path.expanduser(args.kt_weight_path)):
        missing.append(f"kt_weight_path: {args.kt_weight_path} does not exist or is not a directory.")
    directory = args.kt_prompt_cache_dir
    if isinstance(directory, str) and os.path.exists(path := os.path.expanduser(directory)) and not os.path.isdir(path):
        missing.append(f"kt_prompt_cache_dir: {directory} is not a directory.")
    if isinstance(args.kt_gpu_experts_path, str) and not os.path.exists(os.path.expanduser(args.kt_gpu_experts_path)):
        missing.append(f"kt_gpu_experts_path: {args.kt_gpu_experts_path} does not exist.")
    if isinstance(args.kt_moe_lora_path, str) and not os.path.isfile(os.path.expanduser(args.kt_moe_lora_path)):
        missing.append(f"kt_moe_lora_path: {args.kt_moe_lora_path} does not exist or is not a file.")
    return missing


def _check_machine(args: Any) -> list[Any]:
    nodes = len(numa_nodes())
    if (args.kt_threadpool_count or 0) > nodes:  # as in LLaMA-Factory's own examples, made for servers
        logger.warning(
            "kt_threadpool_count: %d sub-pools asked for, this process may use %d NUMA node(s); using %d.",
            args.kt_threadpool_count, nodes, nodes,
        )  # fmt: skip
        args.kt_threadpool_count = nodes
    request = PlanRequest(pools=threadpool_count(args), shared=bool(args.kt_gpu_experts))
    try:
        candidates(args.kt_backend, request, merged=args.kt_merge_adapter)
    except (KTConfigError, KTKernelError) as error:
        return [error]
    return []
