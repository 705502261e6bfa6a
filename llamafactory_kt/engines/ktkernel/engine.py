"""What kt-kernel's engines have in common: one kernel object a layer, computed by the process's pool of worker threads."""

from __future__ import annotations

import contextlib
import functools
from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

import torch

from ...adapters import ExpertsShape
from ...checkpoint.expert_weights import LayerWeights
from ..base import Engine, Stream
from ..options import DEFAULT_OPTIONS, EngineOptions, EngineSpec, LayerMemory, ReadExperts
from ..plan import Plan, PlanRequest
from .cpuinfer import fix_pool
from .kernel import KernelKind, KernelObject
from .methods import Method, PackedShape
from .packed_files import PackedLayer, record_for
from .plans import arrange_process, plans
from .runtime import cpu_variant, kernel_lock
from .stream import join, submit


class KTEngine(Engine):
    """One kernel object. Weights are packed while loading, or read from ``.kt`` files."""

    method: ClassVar[Method]
    has_workers = True

    def __init__(self, spec: EngineSpec, read_experts: ReadExperts, options: EngineOptions = DEFAULT_OPTIONS):
        super().__init__(spec, read_experts, options)
        self.packed = PackedShape.of(self.method, spec.shape, options.pools)
        """sizes of the weights as the kernel holds them"""
        self._files = None
        if options.packed_files is not None:
            record = record_for(spec.shape, self.method, options.pools, spec.fingerprint())
            self._files = PackedLayer(options.packed_files, spec.layer, record, self.method)

    @classmethod
    def plans(cls, request: PlanRequest) -> list[Plan]:
        return plans(cls.name, request)

    @classmethod
    def memory(cls, shape: ExpertsShape, rank: int, itemsize: float, options: EngineOptions) -> LayerMemory:
        need = super().memory(shape, rank, itemsize, options)
        packed = PackedShape.of(cls.method, shape, options.pools)
        return replace(need, weights=packed.nbytes, loading=0 if options.packed_files else need.loading)

    @classmethod
    def build(cls) -> str:
        return cpu_variant()

    @classmethod
    def describe_workers(cls, plan: Plan, options: EngineOptions) -> str:
        idle = ", in the idle class" if plan.idle_workers else ""
        return f"kt-kernel {plan.workers} in {options.pools} sub-pool(s){idle}"

    @classmethod
    def start(cls, plan: Plan, options: EngineOptions) -> tuple[Plan, EngineOptions]:
        workers, pools = fix_pool(plan.workers, options.pools)
        return replace(plan, workers=workers), replace(options, pools=pools)

    @classmethod
    def arrange_process(cls, plan: Plan) -> None:
        arrange_process(plan)

    @property
    @abstractmethod
    def kernel(self) -> KernelObject:
        """The kernel object in use."""

    def _kind(self, rank: int, scaling: float) -> KernelKind:
        return KernelKind(self.packed, self.spec.num_experts_per_tok, rank, scaling, self.options.max_chunk)

    def _weights(self) -> LayerWeights | Path:
        """What a kernel object is built from."""
        if self._files is not None:
            self._files.check_files()
            return self._files.root
        size = self.packed.hidden, self.packed.intermediate
        return LayerWeights.stacked(self.read_experts(torch.bfloat16), self.spec.shape, torch.bfloat16, size)

    def forward(self, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        self._check(index)
        kernel, size, most = self.kernel, hidden.shape[1], self.options.max_chunk
        out = torch.empty_like(hidden, memory_format=torch.contiguous_format)
        with kernel_lock:
            buffers = _buffers(most, self.spec.num_experts_per_tok, size, self.packed.hidden)
            for start in range(0, len(hidden), most):
                part = slice(start, start + most)
                x, chosen, scores, result = (buffer[: len(hidden[part])] for buffer in buffers)
                x[:, :size].copy_(hidden[part])
                chosen.copy_(index[part])
                scores.copy_(weights[part])
                kernel.infer.submit(kernel.task(x, chosen, scores, result))
                kernel.infer.sync()
                out[part] = result[:, :size]
        return out

    @property
    def streams(self) -> bool:
        return hasattr(self.kernel.infer, "submit_with_cuda_stream")

    @property
    def stream_hidden_size(self) -> int:
        return self.packed.hidden

    @contextlib.contextmanager
    def on_stream(
        self, stream: Stream, x: torch.Tensor, index: torch.Tensor, scores: torch.Tensor, out: torch.Tensor
    ) -> Iterator[None]:
        self._check(index)
        kernel, most = self.kernel, self.options.max_chunk
        try:
            for start in range(0, len(x), most):
                part = (tensor[start : start + most] for tensor in (x, index, scores, out))
                submit(kernel.infer, stream, kernel.task(*part))
            yield
        finally:
            join(kernel.infer, stream)  # else the next layer would write what this one still reads

    def _check(self, index: torch.Tensor) -> None:
        if index.shape[1] != (wanted := self.spec.num_experts_per_tok):
            raise ValueError(f"expected {wanted} experts per token, got {index.shape[1]}")

    @property
    def nbytes(self) -> int:
        return self.packed.nbytes


@functools.cache  # for each size, as another one's padding is not zero
def _buffers(tokens: int, top_k: int, size: int, padded: int) -> list[torch.Tensor]:
    """What kernels on the CPU read and write, under their lock: x [T, padded], of which all but [T, size] stays zero, index
    and scores [T, K], and the result. Rows that no prompt has needed take no memory."""
    made: list[tuple[int, torch.dtype]] = [
        (padded, torch.bfloat16), (top_k, torch.int64), (top_k, torch.float32), (padded, torch.bfloat16)
    ]  # fmt: skip
    with torch.inference_mode(False):  # a tensor made in that mode can only be written in it
        return [torch.zeros(tokens, columns, dtype=dtype, device="cpu") for columns, dtype in made]
