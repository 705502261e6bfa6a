"""Experts on the native kernels."""

from .engine import NativeEngine

__all__ = ["NativeEngine"]
