"""Checkpoints: which modules and tensors are a model's experts, whether they are supported, and reading them."""
