"""LoRA adapter files: any layout on disk, one form in memory (:class:`ExpertLora`).

Knows safetensors, torch and PEFT's configuration; never a model and never kt-kernel. A new layout is a new
:class:`Adapter` subclass in a file of its own, chosen in :func:`open_adapter`.
"""

from .adapter import Adapter
from .adapter_set import AdapterSet, open_adapters
from .expert_lora import ExpertLora, ExpertsShape
from .location import adapter_looks_local, locate_adapter, looks_local
from .opening import open_adapter, open_files
from .projections import ProjectionAdapter

__all__ = [
    "Adapter",
    "AdapterSet",
    "ExpertLora",
    "ExpertsShape",
    "ProjectionAdapter",
    "adapter_looks_local",
    "locate_adapter",
    "looks_local",
    "open_adapter",
    "open_adapters",
    "open_files",
]
