"""Rules about engines and packed weights, for the ``kt_*`` keys and for ``KTExpertsConfig``, whose names lack the ``kt_``."""

from __future__ import annotations

from ..engines import gpus
from ..engines.native import NativeEngine
from ..engines.options import CACHES, DENSE, LOADS
from ..engines.registry import AUTO, engines, find_engine
from ..ground.internals import switch_problem
from .values import suggestion


def experts_problems(
    backend: str,
    *,
    weight_path: str | None,
    merge_adapter: bool,
    num_threads: int | None,
    pools: int | None,
    load: str = LOADS[0],
    dense: str = "same",
    cache: str = "same",
    gpu_experts: int | str = 0,
    gpu_experts_path: str | None = None,
    prefix: str = "",
) -> list[str]:
    """What is wrong with these values and the environment, one sentence each.

    Args:
        backend: a name as :func:`~llamafactory_kt.engines.registry.canonical_name` spells it.
        pools: NUMA sub-pools; None: not specified.
        prefix: goes before the keys' names in the messages.
    """
    problems, engine = [], find_engine(backend)
    if problem := switch_problem():
        problems.append(problem)
    for name, value, known in (("load", load, LOADS), ("dense", dense, DENSE), ("cache", cache, CACHES)):
        if value not in known:
            problems.append(
                f"{prefix}{name}: unknown value {value!r}, expected one of {', '.join(known)}{suggestion(value, known)}"
            )
        elif isinstance(known, dict) and known[value] and (problem := NativeEngine.problem()):
            problems.append(
                f"{prefix}{name}: {value} needs the native kernels, and {problem}. Set {prefix}{name}: same."
            )
    if gpu_experts != AUTO and (isinstance(gpu_experts, bool) or not isinstance(gpu_experts, int) or gpu_experts < 0):
        problems.append(f"{prefix}gpu_experts must be a whole number of at least 0 or auto, found {gpu_experts!r}.")
    elif gpu_experts and not gpus.visible():
        problems.append(no_gpu(f"{prefix}gpu_experts: {gpu_experts}"))
    if gpu_experts_path and not gpu_experts:
        problems.append(f"{prefix}gpu_experts_path needs {prefix}gpu_experts: a number or auto.")
    if pools is not None and num_threads is not None and num_threads < pools:
        problems.append(
            f"{prefix}num_threads: {num_threads} is fewer than {prefix}threadpool_count: {pools}; give each pool one."
        )
    if weight_path and not (engine is not None and engine.reads_packed_files):
        reading = ", ".join(each.name for each in engines() if each.reads_packed_files)
        problems.append(
            f"{prefix}weight_path is for {prefix}backend: {reading}; with {backend} the experts are read from the checkpoint. "
            f"Remove it, or set {prefix}backend."
        )
    if engine is not None and engine.needs_packed_files and not weight_path:
        packing = [each.name for each in engines() if each.reads_packed_files and not each.needs_packed_files]
        also = f" {', '.join(packing)} can do without." if packing else ""
        problems.append(
            f"{prefix}backend: {engine.name} needs {prefix}weight_path; llamafactory-kt quantize --model MODEL --output DIR --method "
            f"{engine.name.lower()} makes it.{also}"
        )
    if merge_adapter and weight_path:
        problems.append(
            f"{prefix}merge_adapter: true cannot change the packed weights of {prefix}weight_path. Merge the adapter into the "
            f"checkpoint (llamafactory-kt merge) and quantize that, or remove {prefix}merge_adapter."
        )
    return problems


def no_gpu(given: str) -> str:
    """What to say where experts are to be on a GPU, and there is none.

    Args:
        given: the key and its value.
    """
    return (
        f"{given} needs a GPU that PyTorch finds (torch.cuda.is_available()) and the model is loaded to; there is none. Remove it: the CPU "
        "computes all experts."
    )
