"""The engine on the native kernels: weights row-major as the checkpoint has them, one call for a layer's experts, LoRA fused in."""

from __future__ import annotations

import ctypes
import math
import weakref
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from functools import cache, cached_property

import torch

from ...adapters import ExpertLora, ExpertsShape
from ...adapters.keys import PROJECTIONS
from ...checkpoint.formula import ACTIVATIONS, ExpertFormula
from ...ground.machine import usable_cores
from ...native.library import DTYPES, ExpertsCall, Weight, byref, kernels, library
from ...native.on_host import HostCall, HostCalls, cuda_runtime
from ...native.packed import Matrix, PackedWeight, call_of
from ...native.recording import active
from ...native.scratch import scratch
from ..base import Engine, Stream, Undo
from ..options import EngineOptions, LayerMemory
from ..product import Product
from ..streams import note_device, wait_for_streams
from .copying import Experts, copied
from .lora import FusedLora, lora_size

CHUNK = 4096
"""tokens of a call, which bound its scratch memory"""


class NativeEngine(Engine):
    """Sums in float32; BF16 and quantized weights multiply activations that are rounded to bfloat16 where the CPU has instructions for
    that.

    Weights stay where the checkpoint's files are mapped (``options.mapped``), or are copied into huge pages, expert after expert as a
    token reads them.
    """

    name = "native"
    maps_weights = takes_packed = notes_calls = shares = True

    _lora: FusedLora | None = None

    @classmethod
    def problem(cls) -> str | None:
        found = library()
        return found if isinstance(found, str) else None

    @classmethod
    def cannot_compute(cls, formula: ExpertFormula) -> str | None:
        return None

    @classmethod
    def auto(cls, merged: bool) -> bool:
        return True

    @classmethod
    def build(cls) -> str:
        found = library()
        return "" if isinstance(found, str) else str(found.kt_in_use().decode())

    @classmethod
    def memory(cls, shape: ExpertsShape, rank: int, itemsize: float, options: EngineOptions) -> LayerMemory:
        """Experts are copied one at a time, and mapped ones take the memory of the system's file cache."""
        weights = int(shape.num_weights * itemsize)
        if options.mapped:
            return LayerMemory(0, lora_size(shape, rank), 0)
        return LayerMemory(weights, lora_size(shape, rank), weights // shape.num_experts)

    def load(self) -> None:
        shape, formula = self.spec.shape, self.spec.formula
        self._weights = self.read_weights()
        self._biases = self.spec.read_biases()
        self._arrays = {
            projection: _weights([getattr(expert, projection) for expert in self._weights], self._bias(projection))
            for projection in shape.projections
        }
        limit = math.inf if formula.limit is None else formula.limit
        dtype, packing, _ = call_of(self._weights[0].down)
        self.call = ExpertsCall(
            shape.num_experts, shape.hidden_size, shape.intermediate_size, 0, dtype,
            ACTIVATIONS.index(formula.activation), formula.limit_activated, formula.alpha, limit, formula.up_offset, packing,
            *(self._arrays.get(projection) for projection in PROJECTIONS),
        )  # fmt: skip

    def read_weights(self) -> Sequence[Experts]:
        """The weights to compute with, in the place where they stay."""
        found: Iterable[Experts] = self.spec.read_packed() or self.read_experts(None)
        return list(found if self.options.mapped else copied(found, self.spec.shape.num_experts))

    def _bias(self, projection: str) -> Sequence[torch.Tensor] | None:
        return getattr(self._biases, projection) if self._biases is not None else None

    def set_lora(self, lora: ExpertLora | None) -> Undo:
        before = self._lora
        self._put(FusedLora(lora) if lora else None)
        return lambda: self._put(before)

    def _put(self, lora: FusedLora | None) -> None:
        wait_for_streams()
        for projection, array in self._arrays.items():
            a, b = lora.factors[projection] if lora else (None, None)
            for expert, weight in enumerate(array):
                weight.a = a[expert].data_ptr() if a is not None else None
                weight.b = b[expert].data_ptr() if b is not None else None
        self._lora, self.lora_rank = lora, lora.rank if lora else 0
        self.call.rank = self.lora_rank

    def forward(self, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        x = hidden.contiguous() if hidden.dtype in DTYPES else hidden.float().contiguous()
        chosen, scores, out = index.long().contiguous(), weights.float().contiguous(), torch.empty_like(x)
        for start in range(0, len(x), CHUNK):
            rows = slice(start, start + CHUNK)
            self.compute(x[rows], chosen[rows], scores[rows], out[rows])
        return out.to(hidden.dtype)

    def compute(self, x: torch.Tensor, index: torch.Tensor, scores: torch.Tensor, out: torch.Tensor) -> None:
        """One call of the kernel. All are contiguous; x and out [T, H] are of one of :data:`DTYPES`, scores float32."""
        tokens, top = index.shape
        threads = torch.get_num_threads()
        needed = kernels().kt_experts_scratch(byref(self.call), tokens, top, threads)
        failed = kernels().kt_experts_forward(
            byref(self.call), x.data_ptr(), DTYPES[x.dtype], tokens, index.data_ptr(), scores.data_ptr(), top, out.data_ptr(),
            scratch(needed), threads,
        )  # fmt: skip
        if failed:
            raise IndexError(f"The router chose an expert that is none of the {self.spec.shape.num_experts}.")
        if active.recorder is not None:
            active.recorder.note("experts", self, (x, index, scores), out)

    def product(self, projection: str, expert: int) -> Product:
        weight, bias = getattr(self._weights[expert], projection), self._bias(projection)
        lora = self._lora.of(projection, expert, weight.shape[0]) if self._lora else ()
        return Product(weight, bias[expert] if bias is not None else None, *lora)

    @property
    def streams(self) -> bool:
        return cuda_runtime() is not None

    captures = streams

    def stream_dtype(self, dtype: torch.dtype) -> torch.dtype:
        return dtype if dtype in DTYPES else super().stream_dtype(dtype)

    @cached_property
    def _calls(self) -> HostCalls:
        weakref.finalize(self, wait_for_streams)  # before anything that the engine holds is freed
        return HostCalls()

    def on_stream(
        self, stream: Stream, x: torch.Tensor, index: torch.Tensor, scores: torch.Tensor, out: torch.Tensor
    ) -> AbstractContextManager[None]:
        note_device(stream.device)
        call = HostCall(
            ctypes.pointer(self.call), x.data_ptr(), index.data_ptr(), scores.data_ptr(), out.data_ptr(), *index.shape, CHUNK,
            DTYPES[x.dtype], min(torch.get_num_threads(), _most_threads()),
        )  # fmt: skip
        return self._calls.queue(stream, call)

    @property
    def holds_packed(self) -> bool:
        return self.takes_packed and isinstance(self._weights[0].down, PackedWeight)

    @property
    def nbytes(self) -> int:
        weights = sum(matrix.nbytes for expert in self._weights for matrix in (expert.gate, expert.up, expert.down))
        return weights + sum(bias.nbytes for bias in self._biases or ())

    @property
    def lora_nbytes(self) -> int:
        return self._lora.nbytes if self._lora else 0


@cache
def _most_threads() -> int:
    """Beside a GPU: one core is left for the thread that queues its work, or waits for it."""
    return max(1, usable_cores() - 1)


def _weights(matrices: Sequence[Matrix], biases: Sequence[torch.Tensor] | None) -> ctypes.Array[Weight]:
    """The experts' ``kt_weight``s."""
    array = (Weight * len(matrices))()
    for number, matrix in enumerate(matrices):
        array[number] = call_of(matrix)[2]
        array[number].bias = biases[number].data_ptr() if biases is not None else None
    return array
