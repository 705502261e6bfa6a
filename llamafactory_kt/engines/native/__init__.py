"""Experts on the native kernels."""

from .engine import NativeEngine
from .integers import Int4Engine, Int8Engine

ENGINES = (NativeEngine, Int8Engine, Int4Engine)

__all__ = ["ENGINES", "Int4Engine", "Int8Engine", "NativeEngine"]
