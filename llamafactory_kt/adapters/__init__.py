"""LoRA adapter files: any layout on disk, one form in memory (:class:`ExpertLora`).

Knows safetensors, torch and PEFT's configuration; never a model and never kt-kernel. A new layout is a new
:class:`Adapter` subclass in a file of its own, chosen in :func:`open_adapter`.
"""

from __future__ import annotations

from pathlib import Path

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


def open_adapter(directory: str | Path) -> Adapter:
    """Open a local adapter directory by its headers.

    Raises:
        KTAdapterError: The configuration or a tensor file is missing, damaged, or of a layout that is not supported.
    """
    directory = Path(directory)
    settings = LoraSettings.read(directory)
    return PerExpertAdapter(directory, settings, open_store(directory))
