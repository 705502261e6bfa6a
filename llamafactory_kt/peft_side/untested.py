"""The check of a PEFT that nobody has tested: three tokens through the first layer that it put LoRA on, against float32."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from ..adapters import Adapter
from ..ground.errors import KTAdapterError
from ..ground.internals import untested
from .part import PeftPart

_PLAIN = {"lora_A.weight", "lora_B.weight"}


@torch.no_grad()
def check_first_layer(model: nn.Module, parts: Sequence[tuple[Adapter, PeftPart]]) -> None:
    """Compare the LoRA of the first plain linear layer of the first adapter with ``scaling * B @ A @ x``, summed over the adapters.

    Raises:
        KTAdapterError: PEFT computes something else.
    """
    plain = (
        module for module, lora in parts[0][1].lora.items()
        if set(lora.tensors) == _PLAIN and not parts[0][0].settings.use_dora
        and isinstance(getattr(model.get_submodule(module), "base_layer", None), nn.Linear)
    )  # fmt: skip
    if (module := next(plain, None)) is None:
        return
    layer: Any = deepcopy(model.get_submodule(module)).float().cpu()
    for parameter in layer.base_layer.parameters():
        parameter.zero_()
    x = torch.randn(3, layer.base_layer.in_features, generator=torch.Generator().manual_seed(0))
    delta = torch.zeros(layer.base_layer.out_features, layer.base_layer.in_features)
    for adapter, part in parts:
        if module in part.lora:
            delta = part.lora[module].sum(adapter).apply(adapter, delta)
    wanted = F.linear(x, delta)
    error = float((layer(x) - wanted).norm() / wanted.norm().clamp_min(1e-30))
    if not error <= 1e-3:
        raise KTAdapterError(
            f"Untested: {', '.join(untested())}: the LoRA of {module} is {error:.2g} from float32. Install a tested version; "
            "llamafactory-kt doctor names them."
        )
