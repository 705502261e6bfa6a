"""kt-kernel's engine for CPUs without AVX-512 BF16."""

from __future__ import annotations

import torch

from ...adapters import ExpertLora
from ...checkpoint.expert_weights import LayerWeights
from ...ground.errors import KTModelError
from ..base import Undo
from .engine import KTEngine
from .inference_kernel import InferenceKernel
from .methods import Method
from .runtime import kernel_problem
from .sft_engine import AMXBF16


class AVX2BF16(KTEngine):
    """bfloat16 weights, and no LoRA beside them: the adapter is merged into the weights while they are loaded."""

    name, aliases = "AVX2BF16", ("AVX2BF16_SFT",)
    method = Method(name, 16, 32)
    bits = 16
    weights_dtype = torch.bfloat16
    computes_lora = False

    _kernel: InferenceKernel

    @classmethod
    def problem(cls) -> str | None:
        return kernel_problem(cls.name, sft=False)

    @classmethod
    def auto(cls, merged: bool) -> bool:
        return merged and AMXBF16.problem() is not None

    @property
    def kernel(self) -> InferenceKernel:
        return self._kernel

    def load(self) -> None:
        weights = self._weights()
        assert isinstance(weights, LayerWeights)
        self._kernel = InferenceKernel(self._kind(0, 1.0), self.spec.layer, weights, verbose=self.options.verbose)

    def set_lora(self, lora: ExpertLora | None) -> Undo:
        if lora is not None:
            raise KTModelError(f"{self.name} computes no LoRA; load the model with the adapter, to have it merged.")
        return lambda: None

    @property
    def lora_nbytes(self) -> int:
        return 0
