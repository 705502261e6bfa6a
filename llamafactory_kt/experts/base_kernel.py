"""kt-kernel's inference kernel for AVX2: for CPUs that have none of its SFT kernels. It knows no LoRA, so the adapter's is
merged into the weights that it is given. Its memory is freed with it, unlike the SFT kernels'.
"""

from __future__ import annotations

from typing import Any

import torch

from .kernel import KernelKind, track
from .kt_runtime import kernel_lock, make_base_moe, quiet_stdout
from .layer_tensors import LayerWeights


class BaseKernel:
    """One kernel object with its weights; offers what :class:`~llamafactory_kt.experts.kernel.Kernel` does but LoRA.

    Args:
        weights: gate, up and down in bf16, padded; not needed afterwards.
        verbose: let the kernel write to stdout.
    """

    lora = None

    def __init__(self, kind: KernelKind, layer: int, weights: LayerWeights, *, verbose: bool):
        self.kind = kind
        with kernel_lock, quiet_stdout(not verbose):
            self.wrapper: Any
            self._kept: Any
            self.wrapper, self._kept = make_base_moe(
                kind.packed.method, layer, kind.num_experts_per_tok, weights, kind.max_chunk
            )
        track(self)

    def forward(self, x: torch.Tensor, index: torch.Tensor, scores: torch.Tensor, out: torch.Tensor) -> None:
        """As :meth:`Kernel.forward <llamafactory_kt.experts.kernel.Kernel.forward>`."""
        infer, count = self._kept[0], torch.tensor([x.shape[0]], dtype=torch.int32)
        task = self.wrapper.forward_task(
            count.data_ptr(), index.shape[1], index.data_ptr(), scores.data_ptr(), x.data_ptr(), out.data_ptr(), False
        )
        infer.submit(task)
        infer.sync()

    def release(self) -> None:
        """Let go of the kernel object."""
        self.wrapper = self._kept = None
