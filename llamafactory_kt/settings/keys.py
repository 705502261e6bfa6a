"""The ``kt_*`` keys of a LLaMA-Factory configuration: defaults, types, and what they stand for."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .sglang_keys import KTServingArguments

SCOPES = ("all", "attention")

CHAT_ONLY_KEYS = (
    "kt_max_chunk",
    "kt_merge_adapter",
    "kt_idle_workers",
    "kt_recalibrate",
    "kt_router_stats",
    "kt_debug_dir",
)
"""keys about experts in this process, which infer_backend: sglang does not have"""

# Keys that upstream's training stack puts into kt_config and that mean nothing when chatting.
TRAINING_KEYS = frozenset(
    {
        "kt_activation_policy", "kt_checkpoint_files", "kt_expert_checkpoint_path", "kt_expert_weight_format",
        "kt_force_fused_expert_lora", "kt_full_weight_grad", "kt_lora_alpha", "kt_lora_dropout",
        "kt_lora_expert_intermediate_size", "kt_lora_expert_num", "kt_lora_rank", "kt_max_cache_depth",
        "kt_model_max_length", "kt_non_expert_weight_path", "kt_share_backward_bb",
        "kt_share_cache_pool", "kt_skip_expert_loading", "kt_train_mode", "kt_use_lora_experts", "kt_weight_lifecycle",
    }
)  # fmt: skip


@dataclass
class KTArguments(KTServingArguments):
    """Arguments pertaining to chatting with the routed experts in KTransformers' kt-kernel."""

    use_kt: bool = field(
        default=False,
        metadata={"help": "Whether to compute the routed experts on the CPU with KTransformers' kt-kernel."},
    )
    kt_backend: str = field(
        default="auto",
        metadata={
            "help": "Engine for the experts: AMXBF16, AMXINT8, AMXINT4 or AVX2BF16 (kt-kernel), oneDNN (torch's own kernels), torch "
            "(float32, slow), or auto: the faster of AMXBF16 and oneDNN. Any letter case; a suffix _SFT is accepted."
        },
    )
    kt_num_threads: str | None = field(
        default=None,
        metadata={"help": "CPU threads of kt-kernel. Default: what is measured to be fastest."},
    )
    kt_idle_workers: bool | None = field(
        default=None,
        metadata={
            "help": "Whether kt-kernel's workers run in the idle scheduling class beside torch's threads, without a GPU. "
            "Default: what is measured to be faster. Say false where other programs keep the cores busy."
        },
    )
    kt_recalibrate: bool = field(
        default=False,
        metadata={"help": "Whether to measure engines and threads again, although this machine's times are known."},
    )
    kt_tp_enabled: bool | None = field(
        default=None,
        metadata={
            "help": "Whether to divide the threads into one sub-pool per NUMA node; false: one on one node. Default: true, or as "
            "kt_weight_path's files are divided."
        },
    )
    kt_threadpool_count: int | None = field(
        default=None,
        metadata={"help": "Number of NUMA sub-pools; overrides kt_tp_enabled. Default: one per NUMA node."},
    )
    kt_weight_path: str | None = field(
        default=None,
        metadata={
            "help": "Directory of packed expert weights (.kt files), for AMXINT8 and AMXINT4; with SGLang, of the experts' "
            "weights in a format of their own."
        },
    )
    kt_max_chunk: int = field(
        default=512,
        metadata={"help": "Tokens per kernel call; longer prompts are split."},
    )
    kt_lora_scope: str = field(
        default="all",
        metadata={
            "help": "Which LoRA is applied besides the routed experts': all, or attention (without shared experts and "
            "dense MLP layers, as early KTransformers chats did)."
        },
    )
    kt_merge_adapter: bool = field(
        default=False,
        metadata={
            "help": "Whether to merge the adapter into the weights while loading: no cost of LoRA afterwards, and no way to "
            "exchange the adapter or take it away."
        },
    )
    kt_moe_lora_path: str | None = field(
        default=None,
        metadata={
            "help": "Path to a moe_lora.pt with the routed experts' LoRA, alone or beside an adapter without it."
        },
    )
    kt_router_stats: bool = field(
        default=False,
        metadata={"help": "Whether to count the tokens and the routing weight that each expert gets."},
    )
    kt_debug: bool = field(
        default=False,
        metadata={
            "help": "Whether to print the model's structure after loading, kt-kernel's own output and each step's times, "
            "and to stop at the first NaN or Inf."
        },
    )
    kt_debug_dir: str | None = field(
        default=None,
        metadata={
            "help": "With kt_debug: directory for a trace of the experts chosen and profiles of the first steps."
        },
    )
    kt_stats: bool = field(
        default=False,
        metadata={
            "help": "Whether llamafactory-cli chat prints each answer's tokens, time to the first one, and speed."
        },
    )
    kt_config: dict | str | None = field(  # type: ignore[type-arg]
        default=None,
        metadata={"help": "The same keys as one dictionary, as newer upstream configurations write them (or JSON)."},
    )


def adapter_directories(args: Any) -> list[Path]:
    """Where the configuration's adapters are; those on the hub are downloaded.

    Raises:
        KTPathError: One is nowhere.
    """
    from ..adapters import locate_adapter

    keys = {
        "subfolder": args.adapter_folder,
        "revision": args.model_revision,
        "cache_dir": args.cache_dir,
        "token": args.hf_hub_token,
    }
    return [locate_adapter(name, **keys) for name in args.adapter_name_or_path or []]


def threadpool_count(args: KTArguments) -> int:
    """NUMA sub-pools: ``kt_threadpool_count``, else one with ``kt_tp_enabled: false``, one per NUMA node with ``true``, and what
    :func:`~llamafactory_kt.engines.ktkernel.sub_pools.sub_pools` says if neither is set."""
    from ..engines.ktkernel.sub_pools import sub_pools

    if args.kt_threadpool_count is not None:
        return args.kt_threadpool_count
    if args.kt_tp_enabled is not None:
        return sub_pools() if args.kt_tp_enabled else 1
    threads = args.kt_num_threads
    return sub_pools(args.kt_weight_path, threads if isinstance(threads, int) else None)
