"""The bytes of a loaded model's weights in the CPU's memory, and those of them that a token reads."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import nn

from ...checkpoint.discovery import ExpertsModule, find_experts
from ...model.state import has_kt_experts, kt_state
from ...peft_side.split import non_expert_nbytes


class Sizes(NamedTuple):
    """Bytes in the CPU's memory."""

    weights: int
    """all, with LoRA"""
    experts_per_token: int
    """of the experts' weights that a token reads"""
    others_per_token: int
    """of the other weights that it reads: all but the embedding"""

    @classmethod
    def of(cls, model: Any) -> Sizes:
        """Of a model with KT experts, or of stock transformers."""
        others, experts, lora, per_token = _in_memory(model), 0, 0, 0
        if has_kt_experts(model):
            for wrapper in kt_state(model).wrappers:
                experts += wrapper.engine.nbytes
                per_token += _chosen(wrapper.engine.nbytes, wrapper.info)
                lora += wrapper.engine.lora_nbytes
        else:
            for info in find_experts(model):
                module = model.get_submodule(info.name)
                size = _in_memory(module)
                copied = any(parameter.is_meta for parameter in module.parameters())
                experts += size
                per_token += size if copied else _chosen(size, info)
            others -= experts
        embedding = model.get_input_embeddings()
        tied = embedding.weight is getattr(model.get_output_embeddings(), "weight", None)
        return cls(experts + lora + others, per_token, others - (0 if tied else _in_memory(embedding)))


def _in_memory(module: nn.Module) -> int:
    """A weight that is nowhere ("meta") is one that accelerate copies to a GPU whole for each call."""
    sizes = non_expert_nbytes(module)
    return sizes.get("cpu", 0) + sizes.get("meta", 0)


def _chosen(size: int, info: ExpertsModule) -> int:
    """Of all experts' bytes, those of a token's experts."""
    return size * info.num_experts_per_tok // info.shape.num_experts
