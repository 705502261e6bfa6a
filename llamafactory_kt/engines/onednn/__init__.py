"""Experts on PyTorch's own kernels (oneDNN)."""

from .engine import OneDNNEngine

__all__ = ["OneDNNEngine"]
