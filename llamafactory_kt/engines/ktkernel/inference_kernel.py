"""kt-kernel's inference kernel for AVX2, for CPUs that run none of its SFT kernels. It computes no LoRA; the adapter's is merged
into the weights that it is given. Unlike the SFT kernels, it frees its own memory.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch

from ...checkpoint.expert_weights import LayerWeights
from ..streams import wait_for_streams
from .cpuinfer import worker_pool
from .kernel import KernelKind, KernelObject
from .methods import Method
from .runtime import kernel_lock, quiet_stdout
from .stream import Task


class InferenceKernel(KernelObject):
    """One kernel object with its weights, and never with LoRA.

    Args:
        weights: gate, up and down in bf16, padded; not needed afterwards.
        verbose: let the kernel write to stdout.
    """

    def __init__(self, kind: KernelKind, layer: int, weights: LayerWeights, *, verbose: bool):
        super().__init__(kind)
        with kernel_lock, quiet_stdout(not verbose):
            self.wrapper: Any
            self._kept: Any
            self.wrapper, self._kept = _make(
                kind.packed.method, layer, kind.num_experts_per_tok, weights, kind.max_chunk
            )
        # what it is given is kept until it was called: the object goes after the wait
        self._drop = weakref.finalize(self, lambda *kept: wait_for_streams(), self.wrapper, self._kept)
        self._drop.atexit = False
        self._built()

    @property
    def infer(self) -> Any:
        return self._kept[0]

    def _make_task(self, given: tuple[int, ...]) -> Task:
        task: Task = self.wrapper.forward_task(*given, False)
        return task

    def release(self) -> None:
        self._drop.detach()
        self.wrapper = self._kept = None


def _make(
    method: Method, layer: int, num_experts_per_tok: int, weights: LayerWeights, max_chunk: int
) -> tuple[Any, Any]:
    """Build the kernel. kt-kernel's Python wrappers of it need CUDA; the kernel does not.

    Args:
        weights: gate, up and down in bf16, padded; they are packed, and not needed afterwards.

    Returns:
        (the kernel object, what it points to and must be kept)
    """
    from kt_kernel import kt_kernel_ext

    experts, intermediate, hidden = weights.gate.shape
    on_gpu, every = torch.zeros(experts, dtype=torch.bool), torch.arange(experts)
    infer = worker_pool()
    config = kt_kernel_ext.moe.MOEConfig(experts, num_experts_per_tok, hidden, intermediate, on_gpu.data_ptr())
    config.layer_idx, config.pool, config.max_len = layer, infer.backend_, max_chunk
    config.gate_projs, config.up_projs, config.down_projs = (
        [[expert.data_ptr() for expert in tensor]] for tensor in (weights.gate, weights.up, weights.down)
    )
    config.gate_scales = config.up_scales = config.down_scales = []
    moe = getattr(kt_kernel_ext.moe, f"{method.name}_MOE")(config)
    infer.submit(moe.load_weights_task(every.data_ptr()))
    infer.sync()
    return moe, (infer, on_gpu, every)
