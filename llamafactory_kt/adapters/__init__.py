"""LoRA adapter files: any layout on disk, one form in memory (:class:`ExpertLora`).

Knows safetensors, torch and PEFT's configuration; never a model and never kt-kernel. A new layout is a new
:class:`Adapter` subclass in a file of its own, chosen in :func:`open_adapter`.
"""

from .adapter import Adapter, ExpertsShape
from .adapter_set import AdapterSet, open_adapters
from .config import LoraSettings
from .expert_lora import ExpertLora
from .location import adapter_looks_local, locate_adapter, looks_local
from .opening import open_adapter, open_files
from .per_expert import PerExpertAdapter
from .stacked import StackedAdapter
from .target_parameters import TargetParametersAdapter

__all__ = [
    "Adapter",
    "AdapterSet",
    "ExpertLora",
    "ExpertsShape",
    "LoraSettings",
    "PerExpertAdapter",
    "StackedAdapter",
    "TargetParametersAdapter",
    "adapter_looks_local",
    "locate_adapter",
    "looks_local",
    "open_adapter",
    "open_adapters",
    "open_files",
]
