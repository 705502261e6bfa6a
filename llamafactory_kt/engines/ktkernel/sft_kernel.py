"""kt-kernel's SFT kernels, which compute LoRA beside the weights: built, given LoRA, and freed when nobody refers to them."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import torch

from ...adapters import ExpertLora
from ...adapters.keys import PROJECTIONS
from ...checkpoint.expert_weights import LayerWeights
from .cpuinfer import fixed_pool, worker_pool
from .free_0_7_2 import building, drop, free_dropped
from .kernel import KernelKind, KernelObject
from .runtime import kernel_lock, quiet_stdout
from .stream import Task

LoraTensors = tuple[torch.Tensor, ...]
"""A and B of gate, up and down as the kernel takes them: bf16 [E, r, in] and [E, out, r], padded"""


class SftKernel(KernelObject):
    """An SFT kernel with its base weights. Its memory is freed when nothing refers to it any more.

    Args:
        weights: gate, up and down in bf16, padded, which the kernel packs and then no longer needs; or the directory with the layer's
            ``.kt`` files.
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
        from kt_kernel import KTMoEWrapper

        kind, packed = self.kind, self.kind.packed
        experts = torch.arange(packed.num_experts)
        worker_pool()  # which the wrapper then finds
        threads, pools = fixed_pool()
        wrapper = KTMoEWrapper(
            mode="sft",
            gpu_experts_mask=None,
            cpuinfer_threads=threads,
            threadpool_count=pools,
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
        """Replace the LoRA; None for the base alone."""
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


def _zero_lora(wrapper: Any) -> None:
    if wrapper._lora_initialized:  # the kernel cannot go back to no LoRA at all; zeros are exact
        for name in (f"{projection}_lora_b" for projection in PROJECTIONS):
            setattr(wrapper, name, torch.zeros_like(getattr(wrapper, name)))  # new ones: the old may be wanted back
        wrapper.update_lora_weights()
