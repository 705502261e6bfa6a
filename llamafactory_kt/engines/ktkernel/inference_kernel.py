"""kt-kernel's inference kernel for AVX2: for CPUs that have none of its SFT kernels. It knows no LoRA, so the adapter's is
merged into the weights that it is given. Its memory is freed with it, unlike the SFT kernels'.
"""

from __future__ import annotations

import weakref
from typing import Any

from ...checkpoint.reader import LayerWeights
from .runtime import kernel_lock, make_base_moe, quiet_stdout
from .sft_kernel import KernelKind, KernelObject
from .stream import Task, settle


class BaseKernel(KernelObject):
    """One kernel object with its weights, and never with LoRA.

    Args:
        weights: gate, up and down in bf16, padded; not needed afterwards.
        verbose: let the kernel write to stdout.
    """

    lora = None

    def __init__(self, kind: KernelKind, layer: int, weights: LayerWeights, *, verbose: bool):
        super().__init__(kind)
        with kernel_lock, quiet_stdout(not verbose):
            self.wrapper: Any
            self._kept: Any
            self.wrapper, self._kept = make_base_moe(
                kind.packed.method, layer, kind.num_experts_per_tok, weights, kind.max_chunk
            )
        # what it is given is kept until it was called: the object goes after the wait
        self._drop = weakref.finalize(self, lambda *kept: settle(), self.wrapper, self._kept)
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
