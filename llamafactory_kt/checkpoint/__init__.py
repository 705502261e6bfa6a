"""Checkpoints: which tensors a model's experts are, whether they fit, and reading them."""
