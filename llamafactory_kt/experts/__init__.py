"""Routed experts on the CPU: finding them in a model, reading them, computing them.

Knows transformers' experts contract and kt-kernel, never LLaMA-Factory. Importing it registers
:class:`KTExpertsConfig` with transformers.
"""

from .config import KTExpertsConfig
from .module import KTExperts
from .quantizer import KTExpertsQuantizer

__all__ = ["KTExperts", "KTExpertsConfig", "KTExpertsQuantizer"]
