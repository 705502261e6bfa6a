"""Models with KT experts: loaded through transformers' quantizer, one state each.

The public names below are resolved on first use, which registers :class:`KTExpertsConfig` with transformers: importing
transformers takes longer than the process that measures engines runs, which needs none of it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .config import KTExpertsConfig
    from .experts_module import KTExperts
    from .quantizer import KTExpertsQuantizer

__all__ = ["KTExperts", "KTExpertsConfig", "KTExpertsQuantizer"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from . import quantizer

    return getattr(quantizer, name)
