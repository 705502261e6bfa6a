"""The ``kt_*`` keys of a LLaMA-Factory configuration: defaults, types, and what they stand for."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .sglang_keys import KTServingArguments
from .values import key

SCOPES = ("all", "attention")

CHAT_ONLY_KEYS = (
    "kt_load", "kt_dense", "kt_cache", "kt_prompt_cache", "kt_prompt_cache_gib", "kt_prompt_cache_dir", "kt_gpu_experts_path", "kt_max_chunk", "kt_merge_adapter", "kt_idle_workers", "kt_recalibrate", "kt_router_stats", "kt_debug_dir",
)  # fmt: skip
"""keys about experts in this process, which do nothing with ``infer_backend: sglang``"""


@dataclass
class KTArguments(KTServingArguments):
    """Arguments pertaining to chatting with the routed experts in KTransformers' kt-kernel."""

    use_kt: bool = key(False, "Whether to compute the routed experts on the CPU with KTransformers' kt-kernel.")
    kt_backend: str = key(
        "auto",
        "Engine for the experts: native (this package's kernels), INT8 or INT4 (the same on integers, quantized while loading or before), AMXBF16, AMXINT8, AMXINT4 or AVX2BF16 (kt-kernel), oneDNN (torch's own "
        "kernels), torch (float32, slow), or auto: the fastest of those that keep all bits. Any letter case; a suffix _SFT is accepted.",
    )
    kt_load: str = key(
        "auto",
        "How weights get into memory: mmap leaves them in the checkpoint's mapped files (loads at once, memory is shared between processes), copy "
        "copies them into huge pages (somewhat faster tokens), auto copies where memory is free. Only the native engine maps experts.",
    )
    kt_dense: str = key(
        "same",
        "What the linear layers around the experts (attention, dense layers, shared experts, output layer) are kept as, without a GPU: same as in "
        "the checkpoint, int8 or int4 (quantized while loading, with a scale for each 32 weights; LoRA stays in full precision).",
    )
    kt_cache: str = key(
        "same",
        "What keys and values of past tokens are kept as, without a GPU: same as the model computes in, or int8 (half the memory, less to read for "
        "each token of long conversations).",
    )
    kt_prompt_cache: bool = key(
        True,
        "Whether to keep keys and values of prompts and answers, so that a prompt that begins like an earlier one computes only what is new.",
    )
    kt_prompt_cache_gib: float | None = key(
        None, "The most memory for kt_prompt_cache, in GiB. Default: a quarter of what is free after the load."
    )
    kt_prompt_cache_dir: str | None = key(
        None,
        "Directory in which long system prompts are kept, computed, for later starts; it may take as much as kt_prompt_cache_gib.",
    )
    kt_gpu_experts: str | None = key(
        None,
        "With a GPU, how many of each layer's experts it computes while the CPU computes the others: a number, or auto for as many as there is "
        "memory for. Those that are used most while chatting. Default: none.",
    )
    kt_gpu_experts_path: str | None = key(
        None,
        "With kt_gpu_experts: stats.json of llamafactory-kt stats, or its directory, for the choice of the first experts. Default: they are "
        "chosen after some tokens.",
    )
    kt_num_threads: str | None = key(None, "CPU threads of kt-kernel. Default: the fastest number measured.")
    kt_idle_workers: bool | None = key(
        None,
        "Whether kt-kernel's workers run in the idle scheduling class beside torch's threads, without a GPU. "
        "Default: whichever is measured to be faster. Set it to false if other programs keep the cores busy.",
    )
    kt_recalibrate: bool = key(
        False, "Whether to measure engines and threads again, although this machine's times are known."
    )
    kt_tp_enabled: bool | None = key(
        None,
        "Whether to divide the threads into one sub-pool per NUMA node; false: a single sub-pool on one node. Default: true, "
        "or the division of kt_weight_path's files.",
    )
    kt_threadpool_count: int | None = key(
        None, "Number of NUMA sub-pools; overrides kt_tp_enabled. Default: one per NUMA node."
    )
    kt_weight_path: str | None = key(
        None,
        "Directory of weights that llamafactory-kt quantize has written, for INT8, INT4, AMXINT8 and AMXINT4. With SGLang: directory of the "
        "experts' weights in kt_method's format.",
    )
    kt_max_chunk: int = key(512, "Tokens per call of kt-kernel; longer prompts are split.")
    kt_lora_scope: str = key(
        "all",
        "Which LoRA to apply besides the routed experts': all, or attention (without shared experts and dense MLP layers, "
        "as early KTransformers chats did).",
    )
    kt_adapters: dict | str | None = key(  # type: ignore[type-arg]  # noqa: RUF009
        None,
        "Adapters to choose from, each by a name: the API's requests by their model, the terminal chat by /load. A dictionary (or JSON) of "
        "names and adapters; without any, a name stands for the model alone.",
    )
    kt_merge_adapter: bool = key(
        False,
        "Whether to merge the adapter into the weights while loading: LoRA then costs nothing, but the adapter cannot be "
        "switched or removed.",
    )
    kt_moe_lora_path: str | None = key(
        None,
        "Path to a moe_lora.pt with the routed experts' LoRA, alone or together with an adapter that has no expert LoRA.",
    )
    kt_router_stats: bool = key(False, "Whether to count the tokens and the routing weight that each expert gets.")
    kt_debug: bool = key(
        False,
        "Whether to print the model's structure after loading, kt-kernel's own output and each step's times, and to stop at "
        "the first NaN or Inf.",
    )
    kt_debug_dir: str | None = key(
        None, "With kt_debug: directory for a trace of the experts chosen and profiles of the first steps."
    )
    kt_stats: bool = key(
        False, "Whether llamafactory-cli chat prints each answer's tokens, time to first token, and speed."
    )
    kt_config: dict | str | None = key(  # type: ignore[type-arg]  # noqa: RUF009
        None, "The same keys as one dictionary (or JSON), as newer upstream configurations write them."
    )


def expanded(path: str | None) -> Path | None:
    """A path of the configuration, with the home directory in place of ``~``; None without one."""
    return Path(os.path.expanduser(path)) if path else None


def adapter_directories(args: Any) -> list[Path]:
    """The local directories of the configuration's adapters; those on the hub are downloaded.

    Raises:
        KTPathError: An adapter exists neither locally nor on the hub.
    """
    return _located("adapter_name_or_path", args.adapter_name_or_path or [], args)


def choice_directories(args: Any) -> dict[str, list[Path]]:
    """The same for ``kt_adapters``, by their names.

    Raises:
        KTPathError: As :func:`adapter_directories`.
    """
    return {name: _located(f"kt_adapters: {name}", paths, args) for name, paths in (args.kt_adapters or {}).items()}


def _located(source: str, names: Iterable[str], args: Any) -> list[Path]:
    from ..adapters import locate_adapter

    hub = {
        "subfolder": args.adapter_folder, "revision": args.model_revision, "cache_dir": args.cache_dir,
        "token": args.hf_hub_token,
    }  # fmt: skip
    return [locate_adapter(name, source, **hub) for name in names]


def threadpool_count(args: KTArguments) -> int:
    """The number of NUMA sub-pools: ``kt_threadpool_count``; else with ``kt_tp_enabled: false`` one, with ``true`` one per NUMA
    node; else that of :func:`~llamafactory_kt.engines.ktkernel.sub_pools.sub_pools`."""
    from ..engines.ktkernel.sub_pools import sub_pools

    if args.kt_threadpool_count is not None:
        return args.kt_threadpool_count
    if args.kt_tp_enabled is not None:
        return sub_pools() if args.kt_tp_enabled else 1
    threads = args.kt_num_threads
    return sub_pools(args.kt_weight_path, threads if isinstance(threads, int) else None)
