"""Compare an engine's output with float32, and judge the difference by bounds.

The LoRA effect is the difference of two outputs, so it has the rounding errors of both. The bounds on its cosine and strength
are relaxed by the rounding error measured on the same rows without LoRA. An effect smaller than that error is not judged.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from ...engines.bounds import Bounds


@dataclass(frozen=True)
class Comparison:
    """An engine's output on some rows, compared with float32."""

    base: float
    """relative error without LoRA"""
    total: float
    """relative error with LoRA"""
    effect: float
    """norm of the LoRA effect in float32, relative to the output's; 0 without LoRA"""
    cosine: float | None
    """between the engine's LoRA effect and float32's; None if float32 has none"""
    strength: float | None
    """the engine's effect projected on float32's; 1 if they are equal"""
    problem: str
    """why it fails; empty if it passes"""


Outputs = tuple[torch.Tensor, torch.Tensor]
"""(without LoRA, with LoRA), both [N, H]"""


def compare(found: Outputs, wanted: Outputs, bounds: Bounds, rounding: float = 0.0) -> Comparison:
    """Compare an engine's outputs with float32's.

    Every row has the same weight, whatever its norm: the hidden states of some tokens are far larger than others'.

    Args:
        rounding: relative rounding error of the engine, if it was measured on more rows than these.
    """
    norm = wanted[1].float().norm(dim=-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    rows, size = norm.shape[0], found[0].numel()
    (base, total), (base_wanted, total_wanted) = (tuple(t.double() / norm for t in pair) for pair in (found, wanted))
    base_error = float((base - base_wanted).norm() / base_wanted.norm())
    total_error = float((total - total_wanted).norm() / math.sqrt(rows))
    effect, effect_wanted = total - base, total_wanted - base_wanted
    size_found, size_wanted = float(effect.norm()), float(effect_wanted.norm())
    # Both outputs have the measured rounding error, and at least that of rounding the result once.
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
            pass  # the effect is smaller than the rounding error
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
