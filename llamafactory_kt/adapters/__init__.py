"""LoRA adapter files: any layout on disk, one form in memory (:class:`ExpertLora`).

Knows safetensors, torch and PEFT's configuration; never a model and never kt-kernel. A new layout is a new
:class:`Adapter` subclass in a file of its own, chosen in :func:`open_adapter`.
"""

from __future__ import annotations

from pathlib import Path

from ..errors import KTAdapterError, KTPathError
from .adapter import Adapter, ExpertsShape
from .config import LoraSettings
from .expert_lora import ExpertLora
from .location import locate_adapter, looks_local
from .per_expert import PerExpertAdapter
from .store import open_store

__all__ = [
    "Adapter",
    "ExpertLora",
    "ExpertsShape",
    "LoraSettings",
    "PerExpertAdapter",
    "locate_adapter",
    "looks_local",
    "open_adapter",
]

_EXPERT_FILES = ("fused_expert_lora.safetensors", "moe_lora.pt")


def open_adapter(directory: str | Path) -> Adapter:
    """Open a local adapter directory by its headers.

    Raises:
        KTPathError: There is no such directory.
        KTAdapterError: The configuration or a tensor file is missing, damaged, or of a layout that is not supported.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise KTPathError(f"{directory} does not exist or is not a directory.")
    if found := [name for name in _EXPERT_FILES if (directory / name).exists()]:
        raise KTAdapterError(
            f"{directory} holds {', '.join(found)}: routed-expert LoRA in a file of its own, which is not supported yet. "
            "Nothing is dropped silently, so the rest of the adapter is not loaded either."
        )
    settings = LoraSettings.read(directory)
    return PerExpertAdapter(directory, settings, open_store(directory))
