"""Experiments with prompts: ``llamafactory-kt generate``, ``compare`` and ``stats``."""
