"""Chat with MoE models in stock LLaMA-Factory: routed experts on the CPU, the whole LoRA adapter applied.

Importing this package loads nothing heavy; the public names below are resolved on first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ._version import __version__

if TYPE_CHECKING:
    from .bootstrap import activate
    from .errors import (
        KTAdapterError,
        KTConfigError,
        KTDataError,
        KTError,
        KTHookError,
        KTKernelError,
        KTMemoryError,
        KTModelError,
        KTPathError,
        KTServerError,
    )
    from .experts import KTExpertsConfig
    from .inference import prepare_for_inference
    from .lab.generating import Answer, generate
    from .lab.router_stats import LayerStats, get_router_stats, print_router_stats, reset_router_stats
    from .lora import LoadReport, apply_adapter, load_moe_lora_from_adapter, switch_adapter

__all__ = [
    "Answer",
    "KTAdapterError",
    "KTConfigError",
    "KTDataError",
    "KTError",
    "KTExpertsConfig",
    "KTHookError",
    "KTKernelError",
    "KTMemoryError",
    "KTModelError",
    "KTPathError",
    "KTServerError",
    "LayerStats",
    "LoadReport",
    "__version__",
    "activate",
    "apply_adapter",
    "generate",
    "get_router_stats",
    "load_moe_lora_from_adapter",
    "prepare_for_inference",
    "print_router_stats",
    "reset_router_stats",
    "switch_adapter",
]

_HOMES = {
    "Answer": "lab.generating",
    "KTExpertsConfig": "experts",
    "LayerStats": "lab.router_stats",
    "LoadReport": "lora",
    "activate": "bootstrap",
    "apply_adapter": "lora",
    "generate": "lab.generating",
    "get_router_stats": "lab.router_stats",
    "load_moe_lora_from_adapter": "lora",
    "prepare_for_inference": "inference",
    "print_router_stats": "lab.router_stats",
    "reset_router_stats": "lab.router_stats",
    "switch_adapter": "lora",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f".{_HOMES.get(name, 'errors')}", __name__), name)
