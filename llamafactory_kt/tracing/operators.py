"""Which step computes which of PyTorch's operators. All others are called as they are, from Python."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch

from .places import CannotLower, Places
from .recorder import Operation


class Lowering(Protocol):
    """What makes steps: :class:`.lowering.Lowering`, which has the meaning of the arguments."""

    places: Places

    def elementwise(
        self, name: str, out: torch.Tensor, a: torch.Tensor, b: torch.Tensor | None = None, *, alpha: float = 0.0, beta: float = 0.0
    ) -> None:  # fmt: skip
        """Add a step over all elements."""

    def row_wise(
        self, name: str, out: torch.Tensor, a: torch.Tensor, index: torch.Tensor | None = None, *, alpha: float = 1.0, n: int = 0
    ) -> None:  # fmt: skip
        """Add a step over rows."""

    def product(
        self, out: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
    ) -> None:
        """Add a product of rows with a constant weight."""


_aten = torch.ops.aten
OPERATORS: dict[Any, Callable[[Lowering, Operation], None]] = {}


def _lowers(*operators: Any) -> Callable[[Callable[..., None]], Callable[..., None]]:
    def register(lower: Callable[..., None]) -> Callable[..., None]:
        OPERATORS.update(dict.fromkeys(operators, lower))
        return lower

    return register


@_lowers(_aten._to_copy.default, _aten.clone.default, _aten.alias_copy.default)
def _copy(to: Lowering, op: Operation) -> None:
    to.elementwise("copy", op.result, op.args[0])


@_lowers(_aten.copy_.default)
def _copy_into(to: Lowering, op: Operation) -> None:
    to.elementwise("copy", op.args[0], op.args[1])


def _unary(name: str) -> Callable[[Lowering, Operation], None]:
    def lower(to: Lowering, op: Operation) -> None:
        to.elementwise(name, op.result, op.args[0])

    return lower


for _name in ("neg", "rsqrt", "sqrt", "sigmoid", "silu", "exp", "square"):
    for _ending in ("", "_"):
        if hasattr(_aten, _name + _ending):
            OPERATORS[getattr(_aten, _name + _ending).default] = _unary(_name)
OPERATORS[_aten.logical_not.default] = _unary("not")


@_lowers(_aten.bitwise_not.default)
def _bitwise_not(to: Lowering, op: Operation) -> None:
    if op.result.dtype != torch.bool:
        raise CannotLower("bits of numbers")
    to.elementwise("not", op.result, op.args[0])


@_lowers(_aten.gelu.default)
def _gelu(to: Lowering, op: Operation) -> None:
    to.elementwise("gelu_tanh" if op.kwargs.get("approximate") == "tanh" else "gelu", op.result, op.args[0])


@_lowers(_aten.pow.Tensor_Scalar)
def _pow(to: Lowering, op: Operation) -> None:
    name = {2: "square", 0.5: "sqrt", -0.5: "rsqrt"}.get(op.args[1])
    if name is None:
        raise CannotLower(f"power {op.args[1]}")
    to.elementwise(name, op.result, op.args[0])


def _binary(to: Lowering, op: Operation, name: str, alpha: float = 0.0) -> None:
    a, b = op.args[:2]
    if isinstance(b, torch.Tensor):
        to.elementwise(name, op.result, a, b, alpha=alpha)
    elif isinstance(b, int | float):
        to.elementwise(name, op.result, a, alpha=alpha, beta=float(b))
    else:
        raise CannotLower(name)


def _alpha(op: Operation) -> float:
    return float(op.args[2] if len(op.args) > 2 else op.kwargs.get("alpha", 1))


@_lowers(_aten.add.Tensor, _aten.add_.Tensor, _aten.add.Scalar, _aten.add_.Scalar)
def _add(to: Lowering, op: Operation) -> None:
    _binary(to, op, "add", _alpha(op))


@_lowers(_aten.sub.Tensor, _aten.sub_.Tensor, _aten.sub.Scalar)
def _sub(to: Lowering, op: Operation) -> None:
    _binary(to, op, "add", -_alpha(op))


@_lowers(_aten.rsub.Scalar, _aten.rsub.Tensor)
def _rsub(to: Lowering, op: Operation) -> None:
    _binary(to, op, "rsub", _alpha(op))


@_lowers(_aten.mul.Tensor, _aten.mul_.Tensor, _aten.mul.Scalar, _aten.mul_.Scalar)
def _mul(to: Lowering, op: Operation) -> None:
    _binary(to, op, "complex_mul" if op.result.dtype == torch.complex64 else "mul")


@_lowers(_aten.div.Tensor, _aten.div_.Tensor, _aten.div.Scalar, _aten.div_.Scalar)
def _div(to: Lowering, op: Operation) -> None:
    _binary(to, op, "div")


@_lowers(_aten.clamp.default)
def _clamp(to: Lowering, op: Operation) -> None:
    given = dict(zip(("input", "min", "max"), op.args, strict=False)) | op.kwargs
    low, high = given.get("min"), given.get("max")
    bounds = (-float("inf") if low is None else float(low)), (float("inf") if high is None else float(high))
    to.elementwise("clamp", op.result, op.args[0], alpha=bounds[0], beta=bounds[1])


@_lowers(_aten.masked_fill.Scalar)
def _masked_fill(to: Lowering, op: Operation) -> None:
    to.elementwise("fill_where", op.result, op.args[0], op.args[1], alpha=float(op.args[2]))


def _is_last(op: Operation, dims: Any) -> bool:
    each = dims if isinstance(dims, list | tuple) else [dims]
    return len(each) == 1 and each[0] % op.args[0].dim() == op.args[0].dim() - 1


@_lowers(_aten.mean.dim, _aten.sum.dim_IntList)
def _sum(to: Lowering, op: Operation) -> None:
    if not _is_last(op, op.args[1]) or op.args[0].dtype == torch.bool:
        raise CannotLower("a sum over other dimensions")
    alpha = 1 / op.args[0].shape[-1] if op.function is _aten.mean.dim else 1.0
    to.row_wise("sum", op.result, op.args[0], alpha=alpha)


@_lowers(_aten._softmax.default)
def _softmax(to: Lowering, op: Operation) -> None:
    if not _is_last(op, op.args[1]):
        raise CannotLower("softmax over other dimensions")
    to.row_wise("softmax", op.result, op.args[0])


@_lowers(_aten.topk.default)
def _topk(to: Lowering, op: Operation) -> None:
    largest = op.args[3] if len(op.args) > 3 else op.kwargs.get("largest", True)
    if not largest or not _is_last(op, op.args[2] if len(op.args) > 2 else op.kwargs.get("dim", -1)):
        raise CannotLower("topk over other dimensions")
    values, indices = op.result
    to.row_wise("topk", values, op.args[0], indices, n=op.args[1])


@_lowers(_aten.gather.default)
def _gather(to: Lowering, op: Operation) -> None:
    a, dim, index = op.args[:3]
    if not _is_last(op, dim) or a.shape[:-1] != index.shape[:-1]:
        raise CannotLower("gather over other dimensions")
    to.row_wise("gather", op.result, a, index, n=index.shape[-1])


@_lowers(_aten.scatter_.value)
def _scatter(to: Lowering, op: Operation) -> None:
    out, dim, index, value = op.args
    if not _is_last(op, dim) or out.shape[:-1] != index.shape[:-1] or op.kwargs:
        raise CannotLower("scatter over other dimensions")
    to.row_wise("scatter", out, out, index, alpha=float(value), n=index.shape[-1])


@_lowers(_aten.zeros_like.default, _aten.ones_like.default)
def _filled(to: Lowering, op: Operation) -> None:
    to.elementwise("fill", op.result, op.result, alpha=float(op.function is _aten.ones_like.default))


@_lowers(_aten.cat.default)
def _cat(to: Lowering, op: Operation) -> None:
    dim, start = (op.args[1] if len(op.args) > 1 else op.kwargs.get("dim", 0)) % op.result.dim(), 0
    for part in op.args[0]:
        to.elementwise("copy", op.result.narrow(dim, start, part.shape[dim]), part)
        start += part.shape[dim]


@_lowers(_aten.mm.default)
def _mm(to: Lowering, op: Operation) -> None:
    to.product(op.result, *op.args)


@_lowers(_aten.addmm.default)
def _addmm(to: Lowering, op: Operation) -> None:
    bias, x, weight = op.args
    if op.kwargs or bias.dim() != 1 or not to.places.is_constant(bias):
        raise CannotLower("a product added to a result")
    to.product(op.result, x, weight, bias)
