"""Kernel objects of kt-kernel's: what all have in common, and those of its SFT kernels, which are built, given LoRA, and given
back when nobody refers to them any more."""

from __future__ import annotations

import functools
import weakref
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ...adapters import ExpertLora
from ...adapters.keys import PROJECTIONS
from ...checkpoint.reader import LayerWeights
from .free_0_7_2 import building, drop, free_dropped
from .methods import PackedShape
from .runtime import kernel_lock, make_wrapper, quiet_stdout
from .stream import Task, settle


@dataclass(frozen=True)
class KernelKind:
    """What a kernel object is built with and cannot change afterwards."""

    packed: PackedShape
    num_experts_per_tok: int
    rank: int
    """0 for one that never gets LoRA"""
    scaling: float
    max_chunk: int


class KernelObject(ABC):
    """One kernel object of kt-kernel's. It is released at the end of the process, unless it is gone before."""

    wrapper: Any

    def __init__(self, kind: KernelKind):
        self.kind = kind
        self._tasks: dict[tuple[int, ...], Task] = {}

    def _built(self) -> None:
        """To be called last: from now on, there is something to be released."""
        _kernels.add(self)

    @property
    @abstractmethod
    def infer(self) -> Any:
        """kt-kernel's queue of tasks."""

    @abstractmethod
    def _make_task(self, given: tuple[int, ...]) -> Task: ...

    @abstractmethod
    def release(self) -> None:
        """Let go of the kernel object for good."""

    def task(self, x: torch.Tensor, index: torch.Tensor, scores: torch.Tensor, out: torch.Tensor) -> Task:
        """What computes at most ``max_chunk`` tokens: x, out [T, hidden] bf16, index [T, K] int64, scores [T, K] float32, all
        contiguous. It holds their addresses, and is kept: they should be of buffers that are used again and again."""
        count = _counts(self.kind.max_chunk).data_ptr() + 4 * x.shape[0]
        given = count, index.shape[1], index.data_ptr(), scores.data_ptr(), x.data_ptr(), out.data_ptr()
        if (task := self._tasks.get(given)) is None:
            task = self._tasks[given] = self._make_task(given)
        return task


_kernels: weakref.WeakSet[KernelObject] = weakref.WeakSet()


def every_wrapper() -> list[Any]:
    """Every kernel object that is in use."""
    return [kernel.wrapper for kernel in _kernels]


def release_all() -> None:
    """Drop every kernel object of the process; only for its end, when its memory goes anyway."""
    settle()
    for kernel in list(_kernels):
        kernel.release()


LoraTensors = tuple[torch.Tensor, ...]
"""A and B of gate, up and down as the kernel takes them: bf16 [E, r, in] and [E, out, r], padded"""


class Kernel(KernelObject):
    """One of the SFT kernels with its base weights. Its memory is given back when it is no longer referenced.

    Args:
        weights: gate, up and down in bf16, padded; they are packed, and not needed afterwards. Or the directory with
            the layer's ``.kt`` files.
        verbose: let the kernel write to stdout.
    """

    def __init__(self, kind: KernelKind, layer: int, weights: LayerWeights | Path, *, verbose: bool):
        super().__init__(kind)
        self.lora: LoraTensors | None = None
        """the LoRA in place; the kernel holds raw pointers into these tensors"""
        with kernel_lock, quiet_stdout(not verbose), building:
            self.wrapper = self._make(layer, weights)
        free_dropped()
        self._drop = weakref.finalize(self, drop, self.wrapper, kind.packed)
        self._drop.atexit = False
        self._built()

    def _make(self, layer: int, weights: LayerWeights | Path) -> Any:
        kind, packed = self.kind, self.kind.packed
        experts = torch.arange(packed.num_experts)
        wrapper = make_wrapper(
            layer_idx=layer,
            num_experts=packed.num_experts,
            num_experts_per_tok=kind.num_experts_per_tok,
            hidden_size=packed.hidden,
            moe_intermediate_size=packed.intermediate,
            chunked_prefill_size=kind.max_chunk,
            method=packed.method.sft,
            weight_path=str(weights) if isinstance(weights, Path) else None,
            lora_rank=max(kind.rank, 1),
            lora_alpha=kind.scaling * max(kind.rank, 1),
        )
        wrapper.share_backward_bb = True  # no transposed copy for training: half the memory
        if isinstance(weights, Path):
            wrapper.load_weights(experts)
        else:
            wrapper.load_weights_from_tensors(weights.gate, weights.up, weights.down, experts)
        return wrapper

    def lora_tensors(self, lora: ExpertLora) -> LoraTensors:
        """``lora`` in the kernel's form: its scaling relative to the kernel's own folded into B, its rank padded."""
        kind, tensors = self.kind, []
        sizes = (kind.packed.hidden, kind.packed.intermediate)
        for projection in PROJECTIONS:
            out_size, in_size = sizes if projection == "down" else sizes[::-1]
            b = lora.folded(projection, kind.scaling)
            for value, shape in ((lora.a[projection], (kind.rank, in_size)), (b, (out_size, kind.rank))):
                tensor = torch.zeros(kind.packed.num_experts, *shape, dtype=torch.bfloat16)
                tensor[:, : value.shape[1], : value.shape[2]] = value
                tensors.append(tensor)
        return tuple(tensors)

    def set_lora(self, tensors: LoraTensors | None) -> None:
        """Put LoRA in place of the one before; None for the base alone."""
        with kernel_lock:
            if tensors is None:
                _zero_lora(self.wrapper)
            else:  # six gradients follow, which an inference never touches
                self.wrapper.init_lora_weights(*tensors, *(torch.empty_like(tensor) for tensor in tensors))
        self.lora = tensors

    @property
    def infer(self) -> Any:
        return self.wrapper.cpu_infer

    def _make_task(self, given: tuple[int, ...]) -> Task:
        task: Task = self.wrapper.moe.forward_sft_task(*given, False)
        return task

    def release(self) -> None:
        self._drop.detach()
        self.wrapper = None


@functools.cache
def _counts(most: int) -> torch.Tensor:
    """int32 0, 1, ... most: a task reads its number of tokens when it runs, which may be after the next was made."""
    return torch.arange(most + 1, dtype=torch.int32, device="cpu")


def _zero_lora(wrapper: Any) -> None:
    if wrapper._lora_initialized:  # the kernel cannot go back to no LoRA at all; zeros are exact
        for name in (f"{projection}_lora_b" for projection in PROJECTIONS):
            setattr(wrapper, name, torch.zeros_like(getattr(wrapper, name)))  # new ones: the old may be wanted back
        wrapper.update_lora_weights()
