"""What a layer's programs rely on: asked for each token, so it has to be quick."""

from __future__ import annotations

from peft.tuners.lora import LoraLayer
from torch import nn

from ..native.fused_linear import Unchanged


class LayerState:
    """A layer's modules, weights, hooks and adapters, as they are now."""

    def __init__(self, layer: nn.Module):
        modules = list(layer.modules())
        self._hooks = [hooks for m in modules if m is not layer for hooks in (m._forward_hooks, m._forward_pre_hooks)]
        members = [own for m in modules for own in (m._parameters, m._buffers, m._modules)]
        self._members = [(own, name, value) for own in members for name, value in own.items()]
        parameters = list(layer.parameters())
        self._addresses = [(value, value.data_ptr()) for value in parameters]
        self._values = Unchanged([*parameters, *layer.buffers()])
        self._adapters = [
            (m, m._disable_adapters, m._active_adapter, dict(m.scaling), list(m.merged_adapters))
            for m in modules
            if isinstance(m, LoraLayer)
        ]

    def holds(self) -> bool:
        """Whether all is as it was, and nobody looks into the layer by hooks."""
        return not (
            any(map(len, self._hooks))
            or any(own.get(name) is not value for own, name, value in self._members)
            or any(value.data_ptr() != address for value, address in self._addresses)
            or not self._values  # programs have copies of LoRA and biases, and what is computed of weights alone
            or any(
                m._disable_adapters is not disabled
                or m._active_adapter != active
                or m.scaling != scaling
                or m.merged_adapters != merged
                for m, disabled, active, scaling, merged in self._adapters
            )
        )
