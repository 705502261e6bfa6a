"""Decoder layers that compute a token in one call, and many of them in one.

A layer's forward is recorded for two tokens. If both recordings are the same program, and this program, lowered to the native kernels'
steps, gives what the second token's recording gave, it computes the tokens from then on. Layers that follow one another then become a
chain: the first one's call computes all, and the others return what they find, if they are called as before. Whatever is different in a
call (several tokens, another kind of cache, hooks, other adapters, gradients) goes the usual way.
"""

from __future__ import annotations

import functools
import logging
import threading
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import _global_forward_hooks, _global_forward_pre_hooks

from ..ground.internals import TESTED, Internal
from ..model.experts_module import KTExperts
from ..native.library import library
from .call import Call, follows
from .chain import Chain
from .comparison import description
from .layer_state import LayerState
from .lowering import lower
from .places import CannotLower
from .program import Program
from .recorder import Recording, record

logger = logging.getLogger(__name__)

INTERNAL = Internal("tracing", "torch", TESTED["torch"])
ARENA = 16 * 2**20
"""bytes for what a layer computes for one token; all layers of a model share it"""
KINDS = 32
"""of calls of a layer that may have programs"""
ATTEMPTS = 4
"""recordings that are compared with a program before it is given up"""
_TOLERANCE = 0.02
"""of what a layer adds to its input: several roundings to bfloat16"""


@dataclass
class _Known:
    """What is known of one kind of call of a layer."""

    first: list[Any] | None = None
    """what the first recording does"""
    length: int | None = None
    """tokens that the cache held then"""
    program: Program | None = None
    continues: bool = False
    """the layer before has the same kind of call, and gives this one its input"""
    chain: Chain | None = None
    layers: list[int] = field(default_factory=list)
    """the numbers of those of the chain, this one first"""
    attempts: int = 0
    """recordings whose program gave something else"""
    refused: bool = False


class _Differs(CannotLower):
    """A program gives something else than the recording. Where two experts have the same score, each is a right choice."""


@dataclass
class _Results:
    """What a chain computed, as its layers are yet to return it."""

    call: Call
    layers: list[TracedLayer]
    found: tuple[torch.Tensor, ...]
    caches: list[tuple[Any, dict[str, Any], Any]]
    """the cache's layers, what they held before, and their keys now"""
    version: int
    """counts changes in place of what was found"""
    next: int = 1


class Shared:
    """What the layers of a model share. One chain computes at a time, in one thread."""

    def __init__(self) -> None:
        memory = torch.empty(ARENA + 64, dtype=torch.uint8, device="cpu")
        start = -memory.data_ptr() % 64
        self.arena = memory[start : start + ARENA]
        self.lock = threading.Lock()
        self.layers: list[weakref.ref[TracedLayer]] = []
        self.of_thread = threading.local()
        """``results``: of the chain that this thread computed last; ``last``: number, call and result of the layer that it recorded last"""


class TracedLayer:
    """Stands in for a decoder layer's ``forward``."""

    def __init__(self, layer: nn.Module, shared: Shared):
        self._layer, self._shared = (
            weakref.ref(layer),
            shared,
        )  # no cycle: a dropped model gives its memory back at once
        self._stock = type(layer).forward
        self._number = len(shared.layers)
        shared.layers.append(weakref.ref(self))
        self.known: dict[Any, _Known] = {}
        self._own_hooks = layer._forward_hooks, layer._forward_pre_hooks
        self._state = LayerState(layer)
        functools.update_wrapper(self, self._stock)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As the layer's own forward."""
        if torch.compiler.is_compiling():
            return self._stock(self._layer(), *args, **kwargs)
        found = self._computed_before(args, kwargs)
        if found is not None:
            return found
        call = Call.of(args, kwargs) if _is_usual() and self.is_as_recorded() else None
        known = self._find(call) if call is not None else None
        if call is None or known is None or known.refused:
            self._shared.of_thread.last = None
            return self._stock(self._layer(), *args, **kwargs)
        if known.program is None:
            return self._record(known, call)
        chain, layers = self._chain(known, call)
        if not chain.fits(call.mask, call.cache) or not self._shared.lock.acquire(blocking=False):
            return self._stock(self._layer(), *args, **kwargs)
        try:
            return self._run(chain, layers, call)
        finally:
            self._shared.lock.release()

    def _find(self, call: Call) -> _Known | None:
        if call.key not in self.known and len(self.known) >= KINDS:
            return None
        return self.known.setdefault(call.key, _Known())

    def is_as_recorded(self) -> bool:
        """Whether nobody looks into the layer, or has changed its weights or adapters."""
        layer = self._layer()
        return layer is not None and not layer.training and self._state.holds()

    def _run(self, chain: Chain, layers: list[TracedLayer], call: Call) -> torch.Tensor:
        cache_layers = [call.cache.layers[use.layer] for program in chain.programs for use in program.caches]
        before = [dict(vars(layer)) for layer in cache_layers]
        found = chain.run(call.inputs, call.mask, call.cache)
        self._shared.of_thread.last = None
        if layers[-1]._number < len(self._shared.layers) - 1:  # the next one may be recorded
            self._shared.of_thread.last = layers[-1]._number, call, found[-1]
        if len(layers) > 1:
            caches = [(layer, state, layer.keys) for layer, state in zip(cache_layers, before, strict=True)]
            self._shared.of_thread.results = _Results(call, layers, found, caches, found[0]._version)
        return found[0]

    def _computed_before(self, args: Any, kwargs: Any) -> torch.Tensor | None:
        """What an earlier layer's call has computed for this one, if this one is called as expected."""
        results: _Results | None = getattr(self._shared.of_thread, "results", None)
        if results is None:
            return None
        number = results.next
        if (
            results.layers[number] is not self
            or results.version != results.found[0]._version
            or not follows(args, kwargs, results.call, results.found[number - 1])
        ):
            self._take_back(results)
            return None
        results.next += 1
        if results.next == len(results.layers):
            self._shared.of_thread.results = None
        return results.found[number]

    def _take_back(self, results: _Results) -> None:
        """The caches of layers that have not returned what the chain found forget what it has appended."""
        self._shared.of_thread.results = None
        programs = [layer.known[results.call.key].program for layer in results.layers]
        kept = sum(len(program.caches) for program in programs[: results.next] if program is not None)
        for layer, before, after in results.caches[kept:]:
            if layer.keys is after:  # nobody has changed it since
                vars(layer).update(before)

    def _chain(self, known: _Known, call: Call) -> tuple[Chain, list[TracedLayer]]:
        """The chain that begins with this layer: as many layers as follow one another, have programs and are as they were recorded."""
        wanted = [self]
        for reference in self._shared.layers[self._number + 1 :]:
            layer = reference()
            following = layer.known.get(call.key) if layer is not None else None
            if (
                layer is None
                or following is None
                or following.program is None
                or not following.continues
                or any(map(len, (*wanted[-1]._own_hooks, *layer._own_hooks)))
                or not layer.is_as_recorded()
            ):
                break
            wanted.append(layer)
        numbers = [layer._number for layer in wanted]
        if known.chain is None or known.layers != numbers:
            programs = [layer.known[call.key].program for layer in wanted]
            known.chain, known.layers = Chain([program for program in programs if program is not None]), numbers
        return known.chain, wanted

    def _record(self, known: _Known, call: Call) -> Any:
        layer, length = self._layer(), call.length
        if known.first is not None and length is not None and length == known.length:
            # in another conversation: a number that follows from the length would look like a constant
            self._shared.of_thread.last = None
            return self._stock(layer, *call.args, **call.kwargs)
        with record() as recording:
            result = self._stock(layer, *call.args, **call.kwargs)
        last = getattr(self._shared.of_thread, "last", None)
        known.continues = last is not None and last[0] == self._number - 1 and call.continues(*last[1:])
        is_last = self._number == len(self._shared.layers) - 1  # which lets go of the cache
        self._shared.of_thread.last = None if is_last else (self._number, call, result)
        try:
            if not isinstance(result, torch.Tensor):
                raise CannotLower("it returns more than hidden states")
            if known.first is None:
                known.first = description(recording.operations, call.inputs, call.mask)
                known.length = length
            else:
                # its tensors are written to in any mode
                with self._shared.lock, torch.inference_mode(False), torch.no_grad():
                    known.program = self._program(known.first, recording, call, result)
        except Exception as problem:  # the layer has computed its token, and goes on as it is
            known.attempts += 1
            known.refused = not isinstance(problem, _Differs) or known.attempts == ATTEMPTS
            logger.debug("%s is computed step by step: %r.", type(layer).__name__, problem)
        return result

    def _program(self, first: list[Any], recording: Recording, call: Call, result: torch.Tensor) -> Program:
        operations = recording.operations
        if description(operations, call.inputs, call.mask) != first:
            raise CannotLower("it computes something else for each token")
        layers = getattr(call.cache, "layers", ())
        program = lower(operations, call.inputs, call.mask, result, self._shared.arena, layers)
        found = Chain([program]).repeat(call.inputs, call.mask).float()
        for use in program.caches:
            use.found = ()  # let go of the cache
        base = call.inputs[0].float() if call.inputs[0].shape == result.shape else torch.zeros(())
        wrong, wanted = (found - result.float()).norm(), (result.float() - base).norm()
        if not wrong <= _TOLERANCE * wanted:
            raise _Differs(f"its program is {wrong / wanted:.2g} off")
        return program


def trace_layers(model: nn.Module) -> None:
    """Let the decoder layers of a model with KT experts compute tokens in few calls, where they can. Again after each change of the
    model's modules."""
    if not INTERNAL.usable or isinstance(library(), str):
        return
    for layers in _decoder_layers(model):
        shared = Shared()
        for layer in layers:
            own = vars(layer).get("forward")
            if own is None or isinstance(own, TracedLayer):
                vars(layer)["forward"] = TracedLayer(layer, shared)


def _is_usual() -> bool:
    return not (
        torch.is_grad_enabled()
        or torch._C._len_torch_dispatch_stack()
        or torch.is_autocast_enabled("cpu")
        or _global_forward_hooks
        or _global_forward_pre_hooks
    )


def _decoder_layers(model: nn.Module) -> Iterator[nn.ModuleList]:
    """The lists of modules with experts in them."""
    for module in model.modules():
        if isinstance(module, nn.ModuleList):
            experts = [part for part in module.modules() if isinstance(part, KTExperts)]
            known = all(part.engine.notes_calls and not part.debugger and not part.split for part in experts)
            if experts and known and not any(part in experts for part in module):
                yield module
