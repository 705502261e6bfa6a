"""Experts in kt-kernel: its SFT kernels (``AMXBF16_SFT`` and its 8- and 4-bit sisters; AVX-512 BF16 or AMX), and its
inference kernel for AVX2."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import torch

from ..adapters import ExpertLora
from ..adapters.expert_lora import mantissa
from ..errors import KTModelError
from . import queueing
from .base_kernel import BaseKernel
from .engine import Engine, EngineSpec, ReadExperts, Undo
from .kernel import Kernel, KernelKind
from .kt_runtime import kernel_lock
from .layer_tensors import LayerWeights
from .methods import Method, PackedShape
from .queueing import Stream, Task
from .stored import StoredLayer

logger = logging.getLogger(__name__)


class KTEngine(Engine):
    """One kernel object. Its LoRA rank and scaling are fixed when it is built: a smaller rank is padded with zeros,
    another scaling is folded into B, a larger rank builds a new object from the checkpoint. A method without LoRA takes
    none.

    Args:
        method: how the weights are packed.
        stored: the layer's packed weights on disk; None packs the checkpoint's while loading.
        max_chunk: tokens per kernel call; longer inputs are split.
        pools: NUMA sub-pools.
        verbose: let the kernel write to stdout while it loads.
    """

    def __init__(
        self,
        spec: EngineSpec,
        read_experts: ReadExperts,
        method: Method,
        stored: StoredLayer | None = None,
        *,
        max_chunk: int,
        pools: int,
        verbose: bool,
    ):
        super().__init__(spec, read_experts)
        self.name, self._method, self._stored = method.name, method, stored
        self._max_chunk, self._pools, self._verbose = max_chunk, pools, verbose

    def load(self) -> None:
        self._kernel = self._build(self.spec.lora_rank, self.spec.lora_scaling)

    def _build(self, rank: int, scaling: float) -> Kernel | BaseKernel:
        packed = PackedShape.of(self._method, self.spec.shape, self._pools)
        kind = KernelKind(packed, self.spec.num_experts_per_tok, rank, mantissa(scaling), self._max_chunk)
        weights: LayerWeights | Path
        if self._stored:
            self._stored.check_files()
            weights = self._stored.root
        else:
            weights = LayerWeights.stacked(
                self._read_experts(torch.bfloat16),
                self.spec.shape,
                torch.bfloat16,
                (packed.hidden, packed.intermediate),
            )
            if not self._method.lora:
                return BaseKernel(kind, self.spec.layer, weights, verbose=self._verbose)
        return Kernel(kind, self.spec.layer, weights, verbose=self._verbose)

    def set_lora(self, lora: ExpertLora | None) -> Undo:
        queueing.settle()
        kernel, rank = self._kernel, self.lora_rank
        if isinstance(kernel, BaseKernel):
            if lora is not None:
                raise KTModelError(f"{self.name} computes no LoRA; load the model with the adapter, to have it merged.")
            return lambda: None
        tensors = kernel.lora
        if lora is not None and lora.rank > kernel.kind.rank:
            logger.warning(
                "layer %d: LoRA rank %d exceeds the rank %d this kernel was built for; reading the layer again.",
                self.spec.layer, lora.rank, kernel.kind.rank,
            )  # fmt: skip
            new = self._build(lora.rank, float(lora.scaling["gate"][0, 0]))
            assert isinstance(new, Kernel)
            new.set_lora(new.lora_tensors(lora))
            self._kernel = new
        else:
            kernel.set_lora(kernel.lora_tensors(lora) if lora is not None else None)
        self.lora_rank = lora.rank if lora is not None else 0

        def undo() -> None:
            queueing.settle()
            if kernel is self._kernel:
                kernel.set_lora(tensors)
            self._kernel, self.lora_rank = kernel, rank

        return undo

    def forward(self, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        kernel, given = self._kernel, self.as_read(hidden, index, weights)
        out = torch.empty_like(given[0])
        with kernel_lock:
            for task in self._tasks(*given, out):
                kernel.infer.submit(task)
                kernel.infer.sync()
        return out[:, : hidden.shape[1]].to(hidden.dtype)

    @property
    def queues(self) -> bool:
        """Whether a GPU's stream can wait for this engine, instead of a thread."""
        return hasattr(self._kernel.infer, "submit_with_cuda_stream")

    def submit(
        self, stream: Stream, x: torch.Tensor, index: torch.Tensor, scores: torch.Tensor, out: torch.Tensor
    ) -> None:
        """Compute on the CPU once the stream has come this far, of what it then finds in x, index and scores as
        :meth:`as_read` gave them; out is like x. All lie on the CPU, and stay there until the stream has passed :meth:`join`."""
        for task in self._tasks(x, index, scores, out):
            queueing.submit(self._kernel.infer, stream, task)

    def join(self, stream: Stream) -> None:
        """Let the stream wait until ``out`` is written."""
        queueing.join(self._kernel.infer, stream)

    def as_read(
        self, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The arguments of :meth:`forward` as the kernel reads them through raw pointers, on their device: bf16 [T, padded H],
        int64 [T, K], float32 [T, K], contiguous."""
        kind = self._kernel.kind
        if index.shape[1] != kind.num_experts_per_tok:
            raise ValueError(f"expected {kind.num_experts_per_tok} experts per token, got {index.shape[1]}")
        x = hidden.to(torch.bfloat16)
        if padding := kind.packed.hidden - hidden.shape[1]:
            x = torch.nn.functional.pad(x, (0, padding))
        return x.contiguous(), index.to(torch.int64).contiguous(), weights.to(torch.float32).contiguous()

    def _tasks(self, *tensors: torch.Tensor) -> Iterator[Task]:
        """Of at most ``max_chunk`` tokens each."""
        most = self._kernel.kind.max_chunk
        for start in range(0, len(tensors[0]), most):
            yield self._kernel.task(*(tensor[start : start + most] for tensor in tensors))

    def nbytes_for_rank(self, rank: int) -> int:
        return self.nbytes if self._method.lora and rank > self._kernel.kind.rank else 0

    @property
    def nbytes(self) -> int:
        return self._kernel.kind.packed.nbytes

    @property
    def lora_nbytes(self) -> int:
        kind, packed = self._kernel.kind, self._kernel.kind.packed
        return 3 * packed.num_experts * kind.rank * (packed.hidden + packed.intermediate) * 2 if self.lora_rank else 0
