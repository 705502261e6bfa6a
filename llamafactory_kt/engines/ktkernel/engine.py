"""Experts in kt-kernel: its SFT kernels (``AMXBF16_SFT`` and its 8- and 4-bit sisters; AVX-512 BF16 or AMX), and its
inference kernel for AVX2."""

from __future__ import annotations

import functools
import logging
from pathlib import Path

import torch

from ...adapters import ExpertLora
from ...adapters.expert_lora import mantissa
from ...checkpoint.reader import LayerWeights
from ...ground.errors import KTModelError
from ..base import Engine, EngineSpec, ReadExperts, Undo
from . import stream as queueing
from .inference_kernel import BaseKernel
from .methods import Method, PackedShape
from .packed_files import StoredLayer
from .runtime import kernel_lock
from .sft_kernel import Kernel, KernelKind
from .stream import Stream

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
        kernel, size = self._kernel, hidden.shape[1]
        self._check(index)
        out = torch.empty_like(hidden, memory_format=torch.contiguous_format)
        with kernel_lock:
            kind = kernel.kind
            buffers = _buffers(kind.max_chunk, kind.num_experts_per_tok, size, kind.packed.hidden)
            for start in range(0, len(hidden), kind.max_chunk):
                part = slice(start, start + kind.max_chunk)
                x, chosen, scores, result = (buffer[: len(hidden[part])] for buffer in buffers)
                x[:, :size].copy_(hidden[part])
                chosen.copy_(index[part])
                scores.copy_(weights[part])
                kernel.infer.submit(kernel.task(x, chosen, scores, result))
                kernel.infer.sync()
                out[part] = result[:, :size]
        return out

    @property
    def queues(self) -> bool:
        """Whether a GPU's stream can wait for this engine, instead of a thread."""
        return hasattr(self._kernel.infer, "submit_with_cuda_stream")

    def submit(
        self, stream: Stream, x: torch.Tensor, index: torch.Tensor, scores: torch.Tensor, out: torch.Tensor
    ) -> None:
        """Compute on the CPU once the stream has come this far, of what it then finds in x, index and scores as
        :meth:`as_read` gave them; out is like x. All lie on the CPU, and stay there until the stream has passed :meth:`join`."""
        kernel, most = self._kernel, self._kernel.kind.max_chunk
        for start in range(0, len(x), most):
            part = (tensor[start : start + most] for tensor in (x, index, scores, out))
            queueing.submit(kernel.infer, stream, kernel.task(*part))

    def join(self, stream: Stream) -> None:
        """Let the stream wait until ``out`` is written."""
        queueing.join(self._kernel.infer, stream)

    def as_read(
        self, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The arguments of :meth:`forward` as the kernel reads them through raw pointers, on their device: bf16 [T, padded H],
        int64 [T, K], float32 [T, K], contiguous."""
        kind = self._kernel.kind
        self._check(index)
        x = hidden.to(torch.bfloat16)
        if padding := kind.packed.hidden - hidden.shape[1]:
            x = torch.nn.functional.pad(x, (0, padding))
        return x.contiguous(), index.to(torch.int64).contiguous(), weights.to(torch.float32).contiguous()

    def _check(self, index: torch.Tensor) -> None:
        if index.shape[1] != (wanted := self._kernel.kind.num_experts_per_tok):
            raise ValueError(f"expected {wanted} experts per token, got {index.shape[1]}")

    def nbytes_for_rank(self, rank: int) -> int:
        return self.nbytes if self._method.lora and rank > self._kernel.kind.rank else 0

    @property
    def nbytes(self) -> int:
        return self._kernel.kind.packed.nbytes

    @property
    def lora_nbytes(self) -> int:
        kind, packed = self._kernel.kind, self._kernel.kind.packed
        return 3 * packed.num_experts * kind.rank * (packed.hidden + packed.intermediate) * 2 if self.lora_rank else 0


@functools.cache  # for each size, as another one's padding is not zero
def _buffers(tokens: int, top_k: int, size: int, padded: int) -> list[torch.Tensor]:
    """What kernels on the CPU read and write, under their lock: x [T, padded], of which all but [T, size] stays zero, index
    and scores [T, K], and the result. What no prompt has needed takes no memory."""
    made: list[tuple[int, torch.dtype]] = [
        (padded, torch.bfloat16), (top_k, torch.int64), (top_k, torch.float32), (padded, torch.bfloat16)
    ]  # fmt: skip
    with torch.inference_mode(False):  # what is made in that mode can only be written in it
        return [torch.zeros(tokens, columns, dtype=dtype, device="cpu") for columns, dtype in made]
