"""RMSNorm as one call of the native kernels: PyTorch takes seven steps over memory.

A module is recognized by what it computes, not by its name: it has one parameter, a vector, and gives, bit for bit, what one of the
formulas gives.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import nn

from ..native.library import DTYPES, NormCall, byref, kernels, library
from ..native.recording import active

_EPSILONS = ("variance_epsilon", "eps", "epsilon")
"""attributes of transformers' and PyTorch's norms"""


@dataclass(frozen=True)
class NormFormula:
    """``x / sqrt(mean(x^2) + eps) * (weight + offset)``, in float32."""

    eps: float
    offset: float
    round_first: bool
    """to the dtype of x, before the weight is multiplied"""
    dtype: torch.dtype
    """of x and the weight"""

    def __call__(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        wide = x.float()
        found = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        if self.round_first:
            found = found.to(x.dtype).float()
        return (found * (weight.float() + self.offset)).to(x.dtype)


class FusedNorm(nn.Module):
    """Stands in as the class of a norm, together with the norm's own, which computes what the kernels do not read."""

    _kt_formula: NormFormula
    weight: nn.Parameter

    def forward(self, x: torch.Tensor, *more: Any, **by_name: Any) -> torch.Tensor:
        """[..., n], in the dtype of x. With a gate, or what else its class may take, as that class computes it."""
        formula, weight = self._kt_formula, self.weight
        known = x.dtype == weight.dtype == formula.dtype and x.device.type == weight.device.type == "cpu"
        known = known and x.shape[-1:] == weight.shape
        if (
            not known
            or more
            or by_name
            or torch.compiler.is_compiling()
            or (torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad))
        ):
            return super().forward(x, *more, **by_name)  # type: ignore[no-any-return, misc]
        call = NormCall(
            x.shape[-1], weight.data_ptr(), DTYPES[x.dtype], formula.eps, formula.offset, formula.round_first
        )
        rows = x if x.is_contiguous() else x.contiguous()
        out = torch.empty_like(rows)
        count = rows.numel() // rows.shape[-1]
        kernels().kt_norm_forward(
            byref(call), rows.data_ptr(), DTYPES[x.dtype], count, out.data_ptr(), torch.get_num_threads()
        )
        if active.recorder is not None:
            active.recorder.note("norm", call, (rows,), out)
        return out


def fuse_norms(model: nn.Module) -> None:
    """Let the RMSNorms of a model be one call each."""
    if isinstance(library(), str):
        return
    for module in model.modules():
        if not isinstance(module, FusedNorm) and (formula := _formula(module)) is not None:
            vars(module)["_kt_formula"] = formula
            module.__class__ = _fused(type(module))


def _fused(norm: Any) -> Any:
    if norm not in _classes:
        _classes[norm] = type(norm.__name__, (FusedNorm, norm), {"__module__": norm.__module__})
    return _classes[norm]


_classes: dict[Any, type[FusedNorm]] = {}


def _formula(module: nn.Module) -> NormFormula | None:
    weight = module._parameters.get("weight")
    if list(module._parameters) != ["weight"] or weight is None or weight.dim() != 1 or weight.dtype not in DTYPES:
        return None
    eps = next((value for name in _EPSILONS if isinstance(value := getattr(module, name, None), float)), None)
    if eps is None or module._modules or module._buffers or weight.device.type != "cpu" or "forward" in vars(module):
        return None
    return _probed(module, eps, weight)


def _probed(module: nn.Module, eps: float, like: torch.Tensor) -> NormFormula | None:
    """The formula of a norm, found with a weight and inputs of random numbers. Two of one class may differ in their attributes."""
    generator = torch.Generator().manual_seed(0)
    weight, x = (torch.randn(*shape, *like.shape, generator=generator).to(like.dtype) for shape in ((), (16,)))
    probe = copy.copy(module)
    probe._parameters = {"weight": nn.Parameter(weight, requires_grad=False)}
    try:
        with torch.no_grad():
            found = type(module).forward(probe, x)
    except Exception:  # of code that is not ours, called in its own way
        return None
    for offset, round_first in product((0.0, 1.0), (True, False)):
        formula = NormFormula(eps, offset, round_first, like.dtype)
        if isinstance(found, torch.Tensor) and torch.equal(formula(x, weight), found):
            return formula
    return None
