"""Consecutive layers as one program: between two layers, too, a step of Python's takes longer than a norm."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import torch

from ..model.growing_cache import GrowingLayer
from ..native.library import STEPS, Step, byref, kernels
from ..native.scratch import scratch
from .program import CacheUse, Observation, Program

seconds_of_steps: ctypes.Array[ctypes.c_double] | None = None
"""where somebody measures: gets the seconds of each of :data:`~..native.library.STEPS`, by number"""


class Chain:
    """Layers of which each takes the result of the one before, and all else that the first one takes.

    Args:
        programs: of the layers, in order.
    """

    def __init__(self, programs: Sequence[Program]):
        self.programs = list(programs)
        self.parts: list[Any] = []
        """arrays of steps, and functions without arguments, in turn"""
        self._steps: list[Step] = []
        self._moves: list[tuple[int, Step]] = []
        """the first layer's input that a step copies to where a layer reads it"""
        self._results: list[Step] = []
        self._writes: list[tuple[CacheUse, Step, Step]] = []
        """the steps that write new keys and values"""
        self._attentions = [call for program in programs for use in program.caches for call in use.attentions]
        self._experts = [call for program in programs for call in program.experts]
        self._most_keys = self._most_rank = self._most_threads = self._scratch = 0
        for number, program in enumerate(self.programs):
            self._add(program, self.programs[number - 1].output if number else None)
        self._end_part()

    def fits(self, mask: torch.Tensor | None, cache: Any) -> bool:
        """Whether the cache has what the layers append to, each something of its own, and the mask is of as many keys."""
        layers, uses = getattr(cache, "layers", ()), [use for use, _, _ in self._writes]
        if len({use.layer for use in uses}) < len(uses):
            return False
        masked = {id(call) for program in self.programs for call in program.masks}
        for use in uses:
            layer = layers[use.layer] if use.layer < len(layers) else None
            keys = mask.shape[-1] if mask is not None and any(id(call) in masked for call in use.attentions) else None
            if not isinstance(layer, GrowingLayer) or not layer.takes(*use.new, keys):
                return False
        return True

    def run(self, inputs: Sequence[torch.Tensor], mask: torch.Tensor | None, cache: Any) -> tuple[torch.Tensor, ...]:
        """Compute the layers.

        Args:
            inputs: of the first layer, as recorded in shape and dtype.
            mask: of each sequence's single query, [B or 1, 1, 1, keys] bool, or None.
            cache: whose layers grow in place.

        Returns:
            Each layer's result.
        """
        for use, *steps in self._writes:
            _point(use, steps, *cache.layers[use.layer].extend(*use.new))
        return self._compute(inputs, mask, self.parts)

    def repeat(self, inputs: Sequence[torch.Tensor], mask: torch.Tensor | None) -> torch.Tensor:
        """Compute once more what was recorded, with the cache as it was then; the last layer's result."""
        for use, *steps in self._writes:
            _point(use, steps, *use.found)
        return self._compute(inputs, mask, [part for part in self.parts if not isinstance(part, Observation)])[-1]

    def _compute(
        self, inputs: Sequence[torch.Tensor], mask: torch.Tensor | None, parts: Sequence[Any]
    ) -> tuple[torch.Tensor, ...]:
        sources = [tensor.contiguous() for tensor in inputs]
        addresses = [tensor.data_ptr() for tensor in sources]
        for number, step in self._moves:
            step.a = addresses[number]
        output = self.programs[-1].output
        with torch.inference_mode(False):  # what counts changes
            results = torch.empty((len(self.programs), *output.shape), dtype=output.dtype, device="cpu")
        for number, step in enumerate(self._results):
            step.out = results.data_ptr() + number * output.nbytes
        seen = self._key_mask(mask)
        threads = torch.get_num_threads()
        memory = scratch(self._scratch_bytes(threads))
        for part in parts:
            if not isinstance(part, ctypes.Array):
                part()
            elif kernels().kt_run(part, len(part), memory, threads, seconds_of_steps):
                raise IndexError("The router chose an expert that the layer does not have.")
        del seen  # until now, the steps read it
        with torch.inference_mode(False), torch.no_grad():
            return tuple(results[number] for number in range(len(self.programs)))

    def _key_mask(self, mask: torch.Tensor | None) -> torch.Tensor | None:
        if mask is None or not (calls := [call for program in self.programs for call in program.masks]):
            return None
        seen = mask[:, 0, 0].expand(calls[0].batch, -1).contiguous()
        for call in calls:
            call.mask = seen.data_ptr()
        return seen

    def _scratch_bytes(self, threads: int) -> int:
        """What the steps need; attention's part grows with the keys and threads, and is asked for in steps of twice as many. The experts' grows
        with the rank of the LoRA that they have now."""
        most = max((call.keys for call in self._attentions), default=0)
        rank = max((call.rank for call in self._experts), default=0)
        if most > self._most_keys or rank > self._most_rank or threads > self._most_threads or not self._scratch:
            self._most_keys, self._most_rank, self._most_threads = 2 * most, rank, max(threads, self._most_threads)
            needed = [
                kernels().kt_run_scratch(part, len(part), self._most_threads)
                for part in self.parts
                if isinstance(part, ctypes.Array)
            ]
            for call in self._attentions:
                keys, call.keys = call.keys, self._most_keys
                needed.append(kernels().kt_attention_scratch(byref(call), self._most_threads))
                call.keys = keys
            self._scratch = max(needed, default=0) + 1
        return self._scratch

    def _add(self, program: Program, before: torch.Tensor | None) -> None:
        for number, place in enumerate(program.inputs):
            if place is not None:
                step = Step(op=STEPS["memcpy"], out=place.data_ptr(), n=place.nbytes)
                if number == 0 and before is not None:
                    step.a = before.data_ptr()
                else:
                    self._moves.append((number, step))
                self._steps.append(step)
        self._writes += [(use, *use.writes) for use in program.caches]
        for part in program.parts:
            if isinstance(part, list):
                self._steps += part
            else:
                self._end_part()
                self.parts.append(part)
        result = Step(op=STEPS["memcpy"], a=program.output.data_ptr(), n=program.output.nbytes)
        self._results.append(result)
        self._steps.append(result)

    def _end_part(self) -> None:
        """Let the steps so far be an array; what refers to them refers to those in the array then."""
        if not self._steps:
            return
        array = (Step * len(self._steps))(*self._steps)
        placed = {id(step): array[number] for number, step in enumerate(self._steps)}
        self._moves = [(number, placed.get(id(step), step)) for number, step in self._moves]
        self._results = [placed.get(id(step), step) for step in self._results]
        self._writes = [(use, placed.get(id(a), a), placed.get(id(b), b)) for use, a, b in self._writes]
        self.parts.append(array)
        self._steps = []


def _point(use: CacheUse, steps: Sequence[Step], keys: torch.Tensor, values: torch.Tensor) -> None:
    """Let the steps write the last rows of these, and attend to all."""
    for tensor, step in zip((keys, values), steps, strict=True):
        step.out = tensor.data_ptr() + (tensor.shape[2] - step.sizes[2]) * tensor.stride(2) * tensor.itemsize
        step.strides[0][:] = tensor.stride()
    values = values if values.shape[-1] else keys
    for call in use.attentions:
        call.keys, call.k, call.v = keys.shape[2], keys.data_ptr(), values.data_ptr()
        call.k_strides[:], call.v_strides[:] = keys.stride()[:3], values.stride()[:3]
