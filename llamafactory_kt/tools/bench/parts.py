"""What a forward's time goes into, part by part, and how many floating-point operations each part takes.

The calls of the parts are wrapped while a forward is timed, and are themselves again afterwards. A part inside of another one, such
as PEFT's LoRA inside of a linear layer, belongs to the outer one.

Where layers compute a token as a program of the native kernels (:mod:`...tracing`), which is one call, the kernels time its steps.
"""

from __future__ import annotations

import functools
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from ctypes import Array, c_double
from dataclasses import dataclass, field
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ...checkpoint.discovery import ExpertsModule, find_experts
from ...decoding.latent_attention import up_projections
from ...model.experts_module import KTExperts
from ...model.state import has_kt_experts, plain_model
from ...native import calls
from ...native.fused_linear import FusedLinear
from ...native.head_products import HeadProducts
from ...native.library import STEPS
from ...tracing import chain
from .results import ATTENTION, EXPERTS, LINEAR, OUTPUT, PARTS

Call = Callable[..., Any]
_STEPS = {ATTENTION: ["attention"], LINEAR: ["linear", "heads"], EXPERTS: ["experts"]}
"""part -> kinds of the steps that compute it"""
Around = Callable[[str, Call, Callable[..., float]], Call]
"""(part, call, operations of a call's arguments) -> what stands in for the call"""


@dataclass
class PartTimes:
    """Seconds of each part in all forwards of a ``with`` statement."""

    calls: Counter[str] = field(default_factory=Counter)
    """of the wrapped calls"""
    steps: Array[c_double] = field(default_factory=(c_double * len(STEPS)))
    """of the native kernels' programs, by the number of :data:`~...native.library.STEPS`"""

    @property
    def seconds(self) -> dict[str, float]:
        """part -> seconds; of all parts."""
        return {
            part: self.calls[part] + sum(self.steps[STEPS[kind]] for kind in _STEPS.get(part, ())) for part in PARTS
        }


@contextmanager
def parts_of(model: Any) -> Iterator[PartTimes]:
    """Time the parts of the forwards inside of the ``with`` statement. On a GPU, each part waits for its end."""
    times = PartTimes()
    wait = torch.cuda.synchronize if model.device.type == "cuda" else lambda: None

    def timed(part: str, call: Call, _: Callable[..., float]) -> Call:
        def run(*args: Any, **kwargs: Any) -> Any:
            wait()
            started = time.perf_counter()
            try:
                return call(*args, **kwargs)
            finally:
                wait()
                times.calls[part] += time.perf_counter() - started  # type: ignore[assignment]

        return run

    chain.seconds_of_steps = times.steps
    try:
        with _wrapped(model, timed):
            yield times
    finally:
        chain.seconds_of_steps = None


@contextmanager
def operations_of(model: Any) -> Iterator[Counter[str]]:
    """Count the floating-point operations on the CPU of the forwards inside of the ``with`` statement: a product and a sum for each
    weight and row, and for each pair of a query and a key that it sees. LoRA's are not counted.

    Yields:
        part -> operations.
    """
    counted: Counter[str] = Counter()

    def counting(part: str, call: Call, operations: Callable[..., float]) -> Call:
        def run(*args: Any, **kwargs: Any) -> Any:
            counted[part] += operations(*args, **kwargs)  # type: ignore[assignment]
            return call(*args, **kwargs)

        return run

    with _wrapped(model, counting):
        yield counted


@contextmanager
def _wrapped(model: Any, around: Around) -> Iterator[None]:
    """Have the calls of all parts wrapped; those inside of others are not."""
    inside = False

    def outermost(call: Call, wrapped: Call) -> Call:
        @functools.wraps(call)
        def run(*args: Any, **kwargs: Any) -> Any:
            nonlocal inside
            if inside:
                return call(*args, **kwargs)
            inside = True
            try:
                return wrapped(*args, **kwargs)
            finally:
                inside = False

        return run

    def attention(*args: Any, **kwargs: Any) -> Call:
        call = find(*args, **kwargs)
        return outermost(call, around(ATTENTION, call, _attention_operations))

    with ExitStack() as stack:
        for owner, name, part, operations in _KERNEL_CALLS:  # where no module is called
            own_call = getattr(owner, name)
            setattr(owner, name, outermost(own_call, around(part, own_call, operations)))
            stack.callback(setattr, owner, name, own_call)
        for module, part, operations in _modules(model):
            own = vars(module).get("forward")  # of accelerate's hooks, for one
            module.forward = outermost(module.forward, around(part, module.forward, operations))
            stack.callback(_put_back, module, own)
        # Every model asks this one object for the function at each call, and gives it its own eager one as the default.
        find = ALL_ATTENTION_FUNCTIONS.get_interface
        ALL_ATTENTION_FUNCTIONS.get_interface = attention  # type: ignore[method-assign]
        stack.callback(delattr, ALL_ATTENTION_FUNCTIONS, "get_interface")
        yield


_KERNEL_CALLS: list[tuple[Any, str, str, Callable[..., float]]] = [
    (FusedLinear, "__call__", LINEAR, lambda product, x: 2.0 * x.numel() * product.call.rows),
    (HeadProducts, "__call__", LINEAR, lambda product, x: 2.0 * x.numel() * (product.call.cols if product.call.transposed else product.call.rows)),
    (calls, "attention", ATTENTION, lambda q, k, v, scale, window, *_, **__: _pairs_operations(q, k, v, window, True)),
]  # fmt: skip
"""the kernels' calls that latent attention makes by itself"""


def _put_back(module: nn.Module, forward: Call | None) -> None:
    if forward is None:
        del module.forward
    else:
        module.forward = forward


def _modules(model: Any) -> Iterator[tuple[nn.Module, str, Callable[..., float]]]:
    """(module, part, its operations); those inside of others are left out."""
    plain = plain_model(model)
    experts = {} if has_kt_experts(model) else {plain.get_submodule(info.name): info for info in find_experts(plain)}
    head, uncalled = plain.get_output_embeddings(), up_projections(plain)

    def below(module: nn.Module) -> Iterator[tuple[nn.Module, str, Callable[..., float]]]:
        info = module.info if isinstance(module, KTExperts) else experts.get(module)
        linear = module.get_base_layer() if isinstance(module, LoraLayer) else module
        if info is not None:
            yield module, EXPERTS, functools.partial(_experts_operations, info)
        elif isinstance(linear, nn.Linear) and linear not in uncalled:
            yield module, OUTPUT if head in (module, linear) else LINEAR, functools.partial(_linear_operations, linear)
        else:
            for child in module.children():
                yield from below(child)

    return below(plain)


def _of_the_cpu(x: torch.Tensor) -> bool:
    """Also of a model that is still empty."""
    return x.device.type in ("cpu", "meta")


def _linear_operations(layer: nn.Linear, x: torch.Tensor, *_: Any, **__: Any) -> float:
    """x [..., in]"""
    return 2.0 * x.numel() * layer.out_features if _of_the_cpu(x) else 0.0


def _experts_operations(
    info: ExpertsModule, hidden_states: torch.Tensor, top_k_index: torch.Tensor | None = None, *_: Any, **__: Any
) -> float:
    """hidden_states [T, H], top_k_index [T, K]; or hidden_states [E * T, H] alone, where each token has one expert"""
    chosen = top_k_index.numel() if top_k_index is not None else len(hidden_states) // info.shape.num_experts
    return 2.0 * chosen * info.shape.num_weights / info.shape.num_experts


def _attention_operations(
    module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any, **options: Any
) -> float:
    """query [B, heads, T, d], key [B, kv_heads, S, d], value [B, kv_heads, S, dv]; the queries are the last positions"""
    if not _of_the_cpu(query):
        return 0.0
    causal = options.get("is_causal")
    causal = causal if causal is not None else getattr(module, "is_causal", True)
    return _pairs_operations(query, key, value, options.get("sliding_window"), causal)


def _pairs_operations(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int | None, causal: bool) -> float:
    batch, heads, queries, size = q.shape
    keys = k.shape[2]
    pairs = queries * keys
    if causal:
        pairs = int(torch.arange(keys - queries + 1, keys + 1, device="cpu").clamp(max=window or keys).sum())
    return 2.0 * batch * heads * pairs * (size + v.shape[-1])
