"""How far an engine's output may be from float32 arithmetic."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Bounds:
    """What ``llamafactory-kt verify`` accepts.

    The defaults fit bfloat16, which keeps 8 significant bits: one rounding is off by up to 2**-9 = 0.002 of the value. An
    engine rounds the input of each of its three products and their result, which adds up to 0.003 to 0.005 of the output's
    norm; ``relative`` is four times that. ``cosine`` and ``strength`` leave room for A and B being rounded to bfloat16.
    """

    relative: float = 0.02
    """largest error of the output, relative to its norm"""
    cosine: float = 0.99
    """smallest cosine between the LoRA effect in the engine and in float32"""
    strength: float = 0.05
    """largest distance of the LoRA effect's strength from 1"""
