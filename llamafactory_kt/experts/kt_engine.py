"""Experts in kt-kernel's BF16 SFT kernel (``AMXBF16_SFT``; AVX-512 BF16 or AMX)."""

from __future__ import annotations

import logging
import weakref
from dataclasses import dataclass
from typing import Any

import torch

from ..adapters import ExpertLora
from ..adapters.expert_lora import mantissa
from ..adapters.keys import PROJECTIONS
from .engine import Engine, EngineSpec, ReadWeights
from .kt_runtime import kernel_lock, make_wrapper, quiet_stdout

logger = logging.getLogger(__name__)

MULTIPLE = 32
"""Hidden and intermediate size (per sub-pool) must be multiples of this, or the kernel crashes the process."""


@dataclass(frozen=True)
class _Kind:
    """What a kernel object is built with and cannot change afterwards."""

    num_experts: int
    num_experts_per_tok: int
    hidden: int
    intermediate: int
    rank: int
    scaling: float
    max_chunk: int
    pools: int


# kt-kernel 0.7.2 never frees the packed weights of a kernel object that goes away. Objects of dropped models are
# therefore kept and filled again by the next load of the same shape, instead of leaking one model per load.
_idle: dict[_Kind, list[Any]] = {}
_engines: weakref.WeakSet[KTEngine] = weakref.WeakSet()


def idle_bytes(num_experts: int, hidden: int, intermediate: int) -> int:
    """Bytes that idle kernel objects of this (padded) shape hold and a load would use again."""
    count = sum(
        len(w)
        for k, w in _idle.items()
        if (k.num_experts, k.hidden, k.intermediate) == (num_experts, hidden, intermediate)
    )
    return count * 3 * num_experts * hidden * intermediate * 2


def release_all() -> None:
    """Drop every kernel object of the process, in use or idle; only for the end of the process."""
    for engine in list(_engines):
        if engine._retire is not None:
            engine._retire.detach()
        engine._wrapper = None
    _idle.clear()


def _retire(kind: _Kind, holder: list[Any]) -> None:
    _idle.setdefault(kind, []).extend(holder)


def padded(size: int, multiple: int = MULTIPLE) -> int:
    """``size`` rounded up to a multiple; zeros in the padding leave the result unchanged, exactly."""
    return -(-size // multiple) * multiple


class KTEngine(Engine):
    """One kernel object. Its LoRA rank and scaling are fixed when it is built: a smaller rank is padded with zeros,
    another scaling is folded into B, a larger rank builds a new object from the checkpoint.

    Args:
        max_chunk: tokens per kernel call; longer inputs are split.
        pools: NUMA sub-pools.
        verbose: let the kernel write to stdout while it loads.
    """

    name = "AMXBF16"

    def __init__(self, spec: EngineSpec, read_weights: ReadWeights, *, max_chunk: int, pools: int, verbose: bool):
        super().__init__(spec, read_weights)
        self._max_chunk, self._verbose = max_chunk, verbose
        self._kind = self._kind_for(spec.lora_rank, spec.lora_scaling, pools)
        self._wrapper: Any = None
        self._retire: Any = None
        _engines.add(self)

    def _kind_for(self, rank: int, scaling: float, pools: int) -> _Kind:
        shape = self.spec.shape
        return _Kind(
            shape.num_experts, self.spec.num_experts_per_tok, padded(shape.hidden_size),
            padded(shape.intermediate_size, MULTIPLE * pools), max(rank, 1), mantissa(scaling), self._max_chunk, pools,
        )  # fmt: skip

    def load(self) -> None:
        self._wrapper = self._build(self._kind)

    def _build(self, kind: _Kind) -> Any:
        weights = self._read_weights(torch.bfloat16, (kind.hidden, kind.intermediate))
        tensors = (weights.gate, weights.up, weights.down)
        with kernel_lock, quiet_stdout(not self._verbose):
            if idle := _idle.get(kind):
                wrapper = idle.pop()
                wrapper.moe.set_base_weight_pointers(*(t.data_ptr() for t in tensors))
                wrapper.cpu_infer.submit(wrapper.moe.load_weights_task())
                wrapper.cpu_infer.sync()
                self._clear_lora(wrapper)
            else:
                wrapper = make_wrapper(
                    layer_idx=self.spec.layer,
                    num_experts=kind.num_experts,
                    num_experts_per_tok=kind.num_experts_per_tok,
                    hidden_size=kind.hidden,
                    moe_intermediate_size=kind.intermediate,
                    chunked_prefill_size=kind.max_chunk,
                    method="AMXBF16_SFT",
                    lora_rank=kind.rank,
                    lora_alpha=kind.scaling * kind.rank,
                )
                wrapper.share_backward_bb = True  # no transposed copy for training: half the memory
                wrapper.load_weights_from_tensors(*tensors, torch.arange(kind.num_experts))
        # The kernel object outlives this engine: its memory cannot be given back, only used again.
        self._retire = weakref.finalize(self, _retire, kind, [wrapper])
        self._retire.atexit = False
        return wrapper

    @staticmethod
    def _clear_lora(wrapper: Any) -> None:
        if wrapper._lora_initialized:  # the kernel cannot go back to no LoRA at all; zeros are exact
            for name in PROJECTIONS:
                getattr(wrapper, f"{name}_lora_b").zero_()
            wrapper.update_lora_weights()

    def set_lora(self, lora: ExpertLora | None) -> None:
        if lora is None:
            with kernel_lock:
                self._clear_lora(self._wrapper)
            self.lora_rank = 0
            return
        if lora.rank > self._kind.rank:
            logger.warning(
                "layer %d: LoRA rank %d exceeds the rank %d this kernel was built for; reading the layer again.",
                self.spec.layer, lora.rank, self._kind.rank,
            )  # fmt: skip
            kind = self._kind_for(lora.rank, float(lora.scaling["gate"][0]), self._kind.pools)
            old, wrapper = self._retire, self._build(kind)
            self._attach(wrapper, kind, lora)
            self._wrapper, self._kind = wrapper, kind
            old()
        else:
            self._attach(self._wrapper, self._kind, lora)
        self.lora_rank = lora.rank

    @staticmethod
    def _attach(wrapper: Any, kind: _Kind, lora: ExpertLora) -> None:
        """Hand the kernel six stacked bf16 tensors [E, r, in] / [E, out, r], padded, and six gradients it never touches."""
        b = lora.folded(kind.scaling)
        tensors = []
        for projection in PROJECTIONS:
            out_size, in_size = (
                (kind.hidden, kind.intermediate) if projection == "down" else (kind.intermediate, kind.hidden)
            )
            for value, shape in ((lora.a[projection], (kind.rank, in_size)), (b[projection], (out_size, kind.rank))):
                tensor = torch.zeros(kind.num_experts, *shape, dtype=torch.bfloat16)
                tensor[:, : value.shape[1], : value.shape[2]] = value
                tensors.append(tensor)
        with kernel_lock:
            # The wrapper keeps the tensors alive; the kernel holds raw pointers to them.
            wrapper.init_lora_weights(*tensors, *(torch.empty_like(tensor) for tensor in tensors))

    def forward(self, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        tokens, size = hidden.shape
        kind = self._kind
        if index.shape[1] != kind.num_experts_per_tok:
            raise ValueError(f"expected {kind.num_experts_per_tok} experts per token, got {index.shape[1]}")
        x = hidden.to(torch.bfloat16)
        if size != kind.hidden:
            x = torch.nn.functional.pad(x, (0, kind.hidden - size))
        # Contiguous and of the kernel's types: it reads through raw pointers.
        x, index, scores = x.contiguous(), index.to(torch.int64).contiguous(), weights.to(torch.float32).contiguous()
        out = torch.empty_like(x)
        with kernel_lock:
            for start in range(0, tokens, kind.max_chunk):
                part = slice(start, start + kind.max_chunk)
                self._call(x[part], index[part], scores[part], out[part])
        return out[:, :size].to(hidden.dtype)

    def _call(self, x: torch.Tensor, index: torch.Tensor, scores: torch.Tensor, out: torch.Tensor) -> None:
        wrapper, count = self._wrapper, torch.tensor([x.shape[0]], dtype=torch.int32)
        task = wrapper.moe.forward_sft_task(
            count.data_ptr(), index.shape[1], index.data_ptr(), scores.data_ptr(), x.data_ptr(), out.data_ptr(), False
        )
        wrapper.cpu_infer.submit(task)
        wrapper.cpu_infer.sync()

    @property
    def nbytes(self) -> int:
        kind = self._kind
        return 3 * kind.num_experts * kind.hidden * kind.intermediate * 2

    @property
    def lora_nbytes(self) -> int:
        kind = self._kind
        return 3 * kind.num_experts * kind.rank * (kind.hidden + kind.intermediate) * 2 if self.lora_rank else 0
