"""An engine's output against float32: how far they are apart, and whether that is within bounds.

The LoRA effect is a difference of two outputs, so it is seen through the rounding of both. What that takes from its cosine and
its strength is allowed for by the rounding measured on the same rows without LoRA; an effect that drowns in it is not judged.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from ...engines.bounds import Bounds


@dataclass(frozen=True)
class Comparison:
    """An engine's output on some rows against float32."""

    base: float
    """relative error without LoRA"""
    total: float
    """relative error with LoRA"""
    effect: float
    """size of the effect of LoRA in float32, as a part of the output's; 0 where there is none"""
    cosine: float | None
    """between the two effects; None where there is none in float32"""
    strength: float | None
    """the engine's effect along the one in float32, 1 where they are equal"""
    problem: str
    """why it does not pass; empty where it does"""


def compare(
    found: tuple[torch.Tensor, torch.Tensor],
    wanted: tuple[torch.Tensor, torch.Tensor],
    bounds: Bounds,
    rounding: float = 0.0,
) -> Comparison:
    """Compare rows [N, H], each given as (without, with) LoRA.

    Every row counts the same, whatever its norm: some tokens have hidden states a hundred times larger than others.

    Args:
        rounding: relative error of the engine's rounding, where more rows than these have told it.
    """
    norm = wanted[1].float().norm(dim=-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    rows, size = norm.shape[0], found[0].numel()
    (base, total), (base_wanted, total_wanted) = (tuple(t.double() / norm for t in pair) for pair in (found, wanted))
    base_error = float((base - base_wanted).norm() / base_wanted.norm())
    total_error = float((total - total_wanted).norm() / math.sqrt(rows))
    effect, effect_wanted = total - base, total_wanted - base_wanted
    size_found, size_wanted = float(effect.norm()), float(effect_wanted.norm())
    # Two outputs, each off by the rounding that was measured; at least by what rounding the result once takes.
    noise = 2 * max(min(base_error, bounds.relative), rounding, 2.0**-10) * float(base_wanted.norm())
    cosine = strength = None
    problem = ""
    if not all(math.isfinite(value) for value in (base_error, total_error, size_found)):
        problem = "the output holds NaN or Inf"
    elif base_error > bounds.relative:
        problem = f"without LoRA the output is off by {base_error:.3g}, allowed {bounds.relative:g}"
    elif size_wanted == 0:
        if size_found > noise:
            problem = "the engine holds LoRA that the adapter does not have"
    else:
        ratio = noise / size_wanted
        product = float((effect * effect_wanted).sum())
        strength = product / size_wanted**2
        cosine = product / (size_found * size_wanted) if size_found else 0.0
        allowed = bounds.strength + 4 * ratio / math.sqrt(size)
        least = bounds.cosine / math.sqrt(1 + ratio**2)
        if allowed > 0.5:
            pass  # smaller than the rounding of the output, which says nothing about it
        elif size_found <= max(noise, allowed * size_wanted) and abs(strength) <= allowed:
            problem = "the adapter's LoRA has no effect"
        elif cosine < least or abs(strength - 1) > allowed:
            problem = (
                f"the effect of LoRA has strength {strength:.3g} (wanted 1 ± {allowed:.2g}) "
                f"and cosine {cosine:.4f} (at least {least:.4f})"
            )
        if not problem and total_error > bounds.relative:
            problem = f"with LoRA the output is off by {total_error:.3g}, allowed {bounds.relative:g}"
    return Comparison(base_error, total_error, size_wanted / float(base_wanted.norm()), cosine, strength, problem)
