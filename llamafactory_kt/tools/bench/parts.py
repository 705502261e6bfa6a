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
from ...model.experts_module import KTExperts
from ...model.state import has_kt_experts, plain_model
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
        for module, part, operations in _modules(model):
            own = vars(module).get("forward")  # of accelerate's hooks, for one
            module.forward = outermost(module.forward, around(part, module.forward, operations))
            stack.callback(_put_back, module, own)
        # Every model asks this one object for the function at each call, and gives it its own eager one as the default.
        find = ALL_ATTENTION_FUNCTIONS.get_interface
        ALL_ATTENTION_FUNCTIONS.get_interface = attention  # type: ignore[method-assign]
        stack.callback(delattr, ALL_ATTENTION_FUNCTIONS, "get_interface")
        yield


def _put_back(module: nn.Module, forward: Call | None) -> None:
    if forward is None:
        del module.forward
    else:
        module.forward = forward


def _modules(model: Any) -> Iterator[tuple[nn.Module, str, Callable[..., float]]]:
    """(module, part, its operations); those inside of others are left out."""
    plain = plain_model(model)
    experts = {} if has_kt_experts(model) else {plain.get_submodule(info.name): info for info in find_experts(plain)}
    head = plain.get_output_embeddings()

    def below(module: nn.Module) -> Iterator[tuple[nn.Module, str, Callable[..., float]]]:
        info = module.info if isinstance(module, KTExperts) else experts.get(module)
        linear = module.get_base_layer() if isinstance(module, LoraLayer) else module
        if info is not None:
            yield module, EXPERTS, functools.partial(_experts_operations, info)
        elif isinstance(linear, nn.Linear):
            yield module, OUTPUT if head in (module, linear) else LINEAR, functools.partial(_linear_operations, linear)
        else:
            for child in module.children():
                yield from below(child)

    return below(plain)


def _linear_operations(layer: nn.Linear, x: torch.Tensor, *_: Any, **__: Any) -> float:
    """x [..., in]"""
    return 2.0 * x.numel() * layer.out_features if x.device.type == "cpu" else 0.0


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
    if query.device.type != "cpu":
        return 0.0
    batch, heads, queries, size = query.shape
    keys = key.shape[2]
    causal = options.get("is_causal")
    if causal if causal is not None else getattr(module, "is_causal", True):
        seen = torch.arange(keys - queries + 1, keys + 1)
        pairs = int(seen.clamp(max=options.get("sliding_window") or keys).sum())
    else:
        pairs = queries * keys
    return 2.0 * batch * heads * pairs * (size + value.shape[-1])
