"""Chat with MoE models in stock LLaMA-Factory: routed experts on the CPU, the whole LoRA adapter applied.

Importing this package loads nothing heavy; the public names below are resolved on first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ._version import __version__

if TYPE_CHECKING:
    from .apply import LoadReport, apply_adapter, choose_adapter, load_moe_lora_from_adapter, switch_adapter
    from .decoding.optimize import optimize_for_inference, prepare_for_inference
    from .decoding.process import configure_process
    from .ground.errors import (
        KTAdapterError,
        KTConfigError,
        KTDataError,
        KTError,
        KTHookError,
        KTKernelError,
        KTMemoryError,
        KTModelError,
        KTOutputError,
        KTPathError,
        KTServerError,
    )
    from .integration.bootstrap import activate
    from .model import KTExpertsConfig
    from .router_stats.stats import LayerStats, get_router_stats, print_router_stats, reset_router_stats
    from .tools.experiments.generating import Answer, generate

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
    "KTOutputError",
    "KTPathError",
    "KTServerError",
    "LayerStats",
    "LoadReport",
    "__version__",
    "activate",
    "apply_adapter",
    "choose_adapter",
    "configure_process",
    "generate",
    "get_router_stats",
    "load_moe_lora_from_adapter",
    "optimize_for_inference",
    "prepare_for_inference",
    "print_router_stats",
    "reset_router_stats",
    "switch_adapter",
]

_HOMES = {
    "Answer": "tools.experiments.generating",
    "KTExpertsConfig": "model",
    "LayerStats": "router_stats.stats",
    "LoadReport": "apply",
    "activate": "integration.bootstrap",
    "apply_adapter": "apply",
    "choose_adapter": "apply",
    "configure_process": "decoding.process",
    "generate": "tools.experiments.generating",
    "get_router_stats": "router_stats.stats",
    "load_moe_lora_from_adapter": "apply",
    "optimize_for_inference": "decoding.optimize",
    "prepare_for_inference": "decoding.optimize",
    "print_router_stats": "router_stats.stats",
    "reset_router_stats": "router_stats.stats",
    "switch_adapter": "apply",
}
"""where each public name is; those that are not here are exceptions"""


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f".{_HOMES.get(name, 'ground.errors')}", __name__), name)
