"""``llamafactory-kt estimate``: what a model will take on this machine, and how fast it will be, before its weights are there."""

from .run import estimate

__all__ = ["estimate"]
