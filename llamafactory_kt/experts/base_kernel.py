"""kt-kernel's inference kernel for AVX2: for CPUs that have none of its SFT kernels. It knows no LoRA, so the adapter's is
merged into the weights that it is given. Its memory is freed with it, unlike the SFT kernels'.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch

from .kernel import KernelKind, addresses, track
from .kt_runtime import kernel_lock, make_base_moe, quiet_stdout
from .layer_tensors import LayerWeights
from .queueing import Task, settle


class BaseKernel:
    """One kernel object with its weights; offers what :class:`~llamafactory_kt.experts.kernel.Kernel` does but LoRA.

    Args:
        weights: gate, up and down in bf16, padded; not needed afterwards.
        verbose: let the kernel write to stdout.
    """

    lora = None

    def __init__(self, kind: KernelKind, layer: int, weights: LayerWeights, *, verbose: bool):
        self.kind = kind
        self._tasks: dict[tuple[int, ...], Task] = {}
        with kernel_lock, quiet_stdout(not verbose):
            self.wrapper: Any
            self._kept: Any
            self.wrapper, self._kept = make_base_moe(
                kind.packed.method, layer, kind.num_experts_per_tok, weights, kind.max_chunk
            )
        # what it is given is kept until it was called: the object goes after the wait
        self._drop = weakref.finalize(self, lambda *kept: settle(), self.wrapper, self._kept)
        self._drop.atexit = False
        track(self)

    @property
    def infer(self) -> Any:
        """kt-kernel's queue of tasks."""
        return self._kept[0]

    def task(self, x: torch.Tensor, index: torch.Tensor, scores: torch.Tensor, out: torch.Tensor) -> Task:
        """As :meth:`Kernel.task <llamafactory_kt.experts.kernel.Kernel.task>`."""
        given = addresses(self.kind, x, index, scores, out)
        if (task := self._tasks.get(given)) is None:
            task = self._tasks[given] = self.wrapper.forward_task(*given, False)
        return task

    def release(self) -> None:
        """Let go of the kernel object."""
        self._drop.detach()
        self.wrapper = self._kept = None
