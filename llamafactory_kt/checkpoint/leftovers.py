"""Tensors of a checkpoint that nobody reads, and that a weight of the model is wrong without.

transformers reports what it finds unexpected, and goes on. A scale, a zero point or a bias of a weight that is read is
another matter: without it the model computes something else.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence

import torch
from torch import nn

from ..ground.errors import KTModelError, name_some
from ..peft_side.model_names import Target
from .formats import WHOLE, Format
from .stored import StoredTensor, opened
from .stored_weight import StoredWeight

_BELONGS = re.compile(
    r"(scale|scales|scale_inv|scale_\d|scaling_factor|zero|zeros|zero_point|qzeros|g_idx|packed|qweight|blocks|codes|codebooks?"
    r"|absmax|quant_map|quant_state\.\w+|bias|weight_shape|perm|SCB)$",
    re.IGNORECASE,
)
"""how the names of tensors end that belong to a weight, in the formats that are known"""


def check_leftovers(
    model: nn.Module, form: Format, experts: Sequence[str], others: Iterable[tuple[StoredWeight, Target]]
) -> None:
    """Check the weights that are no routed experts'.

    Args:
        form: of the checkpoint.
        experts: names of the experts modules.
        others: the weights, with what transformers makes of them.

    Raises:
        KTModelError: Tensors of experts are of an unknown kind, or tensors belong to other weights of the model and are not
            part of them in this format.
    """
    parameters = model.state_dict().keys()
    modules = {name for name, _ in model.named_modules()}
    known = list(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or [])
    inside = tuple(f"{name}." for name in experts)
    read = opened()
    left = [
        part.name
        for weight, target in others
        if target.name not in parameters and weight.name not in parameters
        and not any(re.search(pattern, target.name) for pattern in known)
        and (target.name.startswith(inside) or (_belongs(weight) and _owner(target.name) in modules))
        for part in weight.parts.values()
        if not part.name.endswith(tuple(form.unused)) and not _is_zero_bias(weight, read)
    ]  # fmt: skip
    if left:
        raise KTModelError(
            f"{len(left)} tensors of the checkpoint belong to weights of {type(model).__name__}, and nothing would read them: "
            f"{name_some(left, 3)}. The answers would be wrong without them. The checkpoint is taken for {form.title}, by the "
            "quantization_config in config.json: restore that, or use another copy of the model."
        )


def _belongs(weight: StoredWeight) -> bool:
    return weight.parts.keys() != {WHOLE} or _BELONGS.search(weight.name) is not None


def _owner(name: str) -> str:
    """The module of a tensor, as ``o_proj`` of ``o_proj.weight_scale`` and of ``o_proj.weight.absmax``."""
    module, _, _ = name.partition(".weight.")
    return module if module != name else name.rpartition(".")[0]


def _is_zero_bias(weight: StoredWeight, read: Callable[[StoredTensor], torch.Tensor]) -> bool:
    """AutoGPTQ stores a bias of zeros for layers that have none."""
    return weight.name.endswith(".bias") and not any(bool(read(part).any()) for part in weight.parts.values())
