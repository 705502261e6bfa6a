"""A recording as a program of the native kernels' steps: :func:`lower`."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch.utils._pytree import tree_map_only

from ..native import coded_rows
from ..native.coded_rows import STORED
from ..native.fused_linear import FusedLinear, fits
from ..native.library import DTYPES, MOST_LINEARS, STEPS, AttentionCall, ExpertsCall, LinearsCall, Step
from .operators import OPERATORS
from .places import CannotLower, Places
from .program import CacheUse, Observation, Program
from .recorder import Operation
from .strides import collapsed

_MOVED = {**DTYPES, STORED: DTYPES[torch.float32]}
"""as what the cache's rows are copied: words bit by bit"""
_DTYPES = {**DTYPES, torch.bool: 3, torch.int64: 4, torch.complex64: 5}


class Lowering:
    """One pass over the operations.

    Args:
        operations: what was recorded.
        inputs: the tensors that the layer was called with.
        mask: the one of them that is the attention mask.
        arena: memory for all that is computed.
        cache_layers: the cache's layers, in order.
    """

    def __init__(
        self,
        operations: Sequence[Operation],
        inputs: Sequence[torch.Tensor],
        mask: torch.Tensor | None,
        output: torch.Tensor,
        arena: torch.Tensor,
        cache_layers: Sequence[Any],
    ):
        self.places = Places(operations, inputs, mask, arena)
        self._cache_layers, self._mask = list(cache_layers), mask
        self._parts: list[Any] = []
        self._steps: list[Step] = []
        self._kept: list[Any] = []
        self._caches: list[CacheUse] = []
        self._masks: list[AttentionCall] = []
        self._engines: list[ExpertsCall] = []
        self._groups: dict[Any, LinearsCall] = {}
        """input -> the products with it, for as long as nothing has been changed in place"""
        for operation in operations:
            self._lower(operation)
        self._end_part()
        if not self.places.is_computed(output):
            raise CannotLower("what it returns is not computed here")
        used = [self.places.moved(tensor) if self.places.is_read(tensor) else None for tensor in inputs]
        self.program = Program(
            self._parts,
            used,
            self.places.moved(output),
            self._caches,
            self._masks,
            self._engines,
            [self._kept, self.places],
        )

    def step(self, name: str, **fields: Any) -> Step:
        """Add a step."""
        step = Step(op=STEPS[name], **fields)
        self._steps.append(step)
        return step

    def elementwise(
        self,
        name: str,
        out: torch.Tensor,
        a: torch.Tensor,
        b: torch.Tensor | None = None,
        *,
        alpha: float = 0.0,
        beta: float = 0.0,
    ) -> None:
        """Add a step over all elements of ``out``, to which a and b are broadcast."""
        operands = [out, a] if b is None else [out, a, b]
        wanted = {torch.complex64} if name == "complex_mul" else {*DTYPES, torch.bool}
        if any(t.dtype not in wanted or t.is_conj() or t.is_neg() for t in operands):
            raise CannotLower(f"{name} of {[str(t.dtype) for t in operands]}")
        sizes, strides = collapsed(out.shape, [t.expand(out.shape).stride() for t in operands])
        places = [self.places.address(t) for t in operands]
        step = self.step(
            name, out=places[0], a=places[1], b=places[2] if b is not None else None, alpha=alpha, beta=beta
        )
        step.sizes[:] = sizes
        for which, tensor in enumerate(operands):
            step.dtypes[which], step.strides[which][:] = _DTYPES[tensor.dtype], strides[which]

    def row_wise(
        self,
        name: str,
        out: torch.Tensor,
        a: torch.Tensor,
        index: torch.Tensor | None = None,
        *,
        alpha: float = 1.0,
        n: int = 0,
    ) -> None:
        """Add a step over the rows of ``a``, its last dimension."""
        given = [t for t in (out, a, index) if t is not None]
        if not all(t.is_contiguous() for t in given) or any(t.dtype not in DTYPES for t in (out, a)):
            raise CannotLower(f"{name} of strided rows")
        step = self.step(name, out=self.places.address(out), a=self.places.address(a), alpha=alpha, n=n)
        step.b = self.places.address(index) if index is not None else None
        step.sizes[:] = (a.numel() // a.shape[-1], a.shape[-1], 1, 1)
        step.dtypes[0], step.dtypes[1] = _DTYPES[out.dtype], _DTYPES[a.dtype]

    def linear(self, call: FusedLinear, x: torch.Tensor, out: torch.Tensor) -> None:
        """Add a product of rows x [T, in]; all of the same rows are computed together."""
        self._kept.append(call)
        key = self.places.address(x), x.dtype, x.shape, call.call.dtype
        group = self._groups.get(key)
        if group is None or group.count == MOST_LINEARS:
            group = self._groups[key] = LinearsCall()
            self._call("linear", group, out, x, n=x.numel() // x.shape[-1])
        group.parts[group.count], group.outs[group.count] = ctypes.pointer(call.call), self.places.address(out)
        group.count += 1

    def product(
        self, out: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
    ) -> None:
        """Add a product of rows with a constant weight [in, out] whose columns are contiguous."""
        if not (
            self.places.is_constant(weight)
            and fits(weight.T)
            and x.dtype in DTYPES
            and x.is_contiguous()
            and out.dtype == x.dtype
        ):
            raise CannotLower("a product of two results")
        self.linear(FusedLinear(weight.T, bias), x, out)

    def _call(self, name: str, call: Any, out: torch.Tensor, x: torch.Tensor, **fields: Any) -> Step:
        self._kept.append(call)
        step = self.step(
            name, out=self.places.address(out), a=self.places.address(x), call=ctypes.addressof(call), **fields
        )
        step.dtypes[0], step.dtypes[1] = _DTYPES[out.dtype], _DTYPES[x.dtype]
        return step

    def _lower(self, operation: Operation) -> None:
        if isinstance(operation.function, str):
            getattr(self, f"_{operation.function}")(*operation.args, operation.result)
            return
        if self._may_differ(operation):
            raise CannotLower(f"{operation.function} is random, or decides what is computed")
        if self.places.is_done(operation):
            return
        if any(map(self.places.is_outside, operation.inputs)):
            raise CannotLower(f"{operation.function} reads the cache or the mask, which lie elsewhere for each token")
        if operation.written:
            self._groups.clear()
        count = len(self._steps)
        try:
            lower = OPERATORS.get(operation.function)
            if lower is None:
                raise CannotLower(str(operation.function))
            lower(self, operation)
        except CannotLower:
            del self._steps[count:]
            self._python(operation)

    def _may_differ(self, operation: Operation) -> bool:
        """Whether another run may do something else: what follows from values, as a number or a size, is not known to a recording."""
        tags = operation.function.tags
        decides = torch.Tag.data_dependent_output in tags or torch.Tag.dynamic_output_shape in tags
        random = torch.Tag.nondeterministic_seeded in tags
        return random or (decides and not all(map(self.places.is_constant, operation.inputs)))

    def _python(self, operation: Operation) -> None:
        """PyTorch's own operator, on the program's memory."""
        args, kwargs = tree_map_only(torch.Tensor, self.places.moved, (operation.args, operation.kwargs))
        outputs = [self.places.moved(tensor) for tensor in operation.outputs]
        function, in_place = operation.function, bool(operation.written)

        def call() -> None:
            found = function(*args, **kwargs)
            if not in_place:
                for to, tensor in zip(outputs, Operation(function, (), {}, found).outputs, strict=True):
                    to.copy_(tensor)

        self._end_part()
        self._parts.append(call)

    def _end_part(self) -> None:
        self._groups.clear()
        if self._steps:
            self._parts.append(self._steps)
            self._steps = []

    # The kernels' calls, by their kind.

    def _linear(self, call: FusedLinear, x: torch.Tensor, out: torch.Tensor) -> None:
        self.linear(call, x, out)

    def _experts(
        self, engine: Any, x: torch.Tensor, index: torch.Tensor, scores: torch.Tensor, out: torch.Tensor
    ) -> None:
        if not (index.is_contiguous() and scores.is_contiguous() and x.is_contiguous()):
            raise CannotLower("experts of strided tensors")
        self._engines.append(engine.call)
        step = self._call("experts", engine.call, out, x, n=x.shape[0])
        step.b, step.c = self.places.address(index), self.places.address(scores)
        step.sizes[0] = index.shape[1]

    def _norm(self, call: Any, x: torch.Tensor, out: torch.Tensor) -> None:
        self._call("norm", call, out, x, n=x.numel() // x.shape[-1])

    def _heads(self, products: Any, x: torch.Tensor, out: torch.Tensor) -> None:
        self._kept.append(products)
        self._call("heads", products.call, out, x, n=x[..., 0, 0].numel())

    def _seen(self, function: Any, *tensors: torch.Tensor) -> None:
        moved = [self.places.moved(tensor) for tensor in tensors[:-1]]
        self._end_part()
        self._parts.append(Observation(function, moved))

    def _encode(self, _: None, states: torch.Tensor, rows: torch.Tensor) -> None:
        step = self.step("encode", out=self.places.address(rows), a=self.places.address(states))
        coded_rows.point(step, states, rows)

    def _append(
        self,
        layer: Any,
        keys: torch.Tensor,
        values: torch.Tensor,
        all_keys: torch.Tensor,
        all_values: torch.Tensor,
        _: None,
    ) -> None:
        writes = []
        for new, every in ((keys, all_keys), (values, all_values)):
            step = self.step("copy", a=self.places.address(new))
            step.sizes[:] = new.shape
            for which, tensor in enumerate((every, new)):
                step.dtypes[which], step.strides[which][:] = _MOVED[tensor.dtype], tensor.stride()
            writes.append(step)
        number = next((n for n, own in enumerate(self._cache_layers) if own is layer), None)
        if number is None or any(use.layer == number for use in self._caches):
            raise CannotLower("a cache that the layer was not called with, or appends to twice")
        moved = self.places.moved(keys), self.places.moved(values)
        self._caches.append(CacheUse(number, moved, (all_keys, all_values), (writes[0], writes[1])))

    def _attention(self, settings: tuple[float, int, torch.Tensor | None], *tensors: torch.Tensor) -> None:
        (q, k, v, *masks), out = tensors[:-1], tensors[-1]
        use = next(
            (u for u in self._caches if u.found[0].data_ptr() == k.data_ptr() and u.values.data_ptr() == v.data_ptr()),
            None,
        )
        if (
            use is None
            or k.shape != use.found[0].shape
            or v.shape[:3] != use.values.shape[:3]
            or v.shape[3] > use.values.shape[3]
            or k.dtype != v.dtype
            or q.stride(-1) != 1
        ):
            raise CannotLower("attention to something else than the cache")
        scale, window, sinks = settings
        batch, heads, queries, width = q.shape
        call = AttentionCall(
            batch=batch, heads=heads, kv_heads=k.shape[1], queries=queries, keys=k.shape[2], key_dim=width, value_dim=out.shape[3],
            dtype=_DTYPES[q.dtype], coded=k.dtype == STORED, scale=scale, window=window, q=self.places.address(q), out=self.places.address(out),
            sinks=sinks.data_ptr() if sinks is not None else None,
        )  # fmt: skip
        call.q_strides[:] = q.stride()[:3]
        if masks:
            if self._mask is None or (masks[0].data_ptr(), masks[0].numel()) != (
                self._mask.data_ptr(),
                self._mask.numel(),
            ):
                raise CannotLower("a mask of the layer's own")
            self._masks.append(call)
        use.attentions.append(call)
        self._kept.append(sinks)
        self._call("attention", call, out, q)


def lower(*given: Any) -> Program:
    """The program of a recording; arguments as in :class:`Lowering`.

    Raises:
        CannotLower: It does something that a program cannot.
    """
    return Lowering(*given).program
