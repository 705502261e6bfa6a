"""Experts in PyTorch's own kernels (oneDNN)."""
