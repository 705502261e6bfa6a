"""Names of LoRA tensors: which belong to routed experts, and which modules the others change."""

from __future__ import annotations

import re
from typing import NamedTuple

PROJECTIONS = ("gate", "up", "down")
PEFT_PREFIX = "base_model.model."
MLP_TARGETS = ("gate_proj", "up_proj", "down_proj")
"""bare names of modules in experts, shared experts and dense layers alike"""

NOT_ON_EXPERTS = (
    "DoRA magnitudes and LoRA biases on experts, and experts trained as a whole, cannot be computed by the kernel: train without use_dora, "
    "bias and modules_to_save on them, or merge the adapter into the base model with PEFT."
)
# Mixtral's checkpoint names: down(silu(w1 x) * w3 x) with w2 = down.
_PROJECTION_NAMES = {
    "gate_proj": "gate", "up_proj": "up", "down_proj": "down", "gate_up_proj": "gate_up", "w1": "gate", "w3": "up", "w2": "down",
}  # fmt: skip

# `experts` must be a whole path component (not `shared_experts`), followed by the expert's number, or by none: all experts. gpt-oss with
# its weights in 4 bits has a list of experts for each projection (`gate_up_projs.5`).
_EXPERT = re.compile(
    r"""^(?P<module>(?:.*\.)?layers\.(?P<layer>\d+)\.(?:.*\.)?experts\.
        (?:(?:(?P<expert>\d+)\.)?(?P<projection>gate_proj|up_proj|down_proj|gate_up_proj|w1|w2|w3)
          |(?P<list>gate_proj|up_proj|down_proj|gate_up_proj)s\.(?P<number>\d+)))
        (?:\.orig_module)?(?P<rest>\..+)$""",
    re.VERBOSE,
)
_LAYER = re.compile(r"^(?P<layer>(?:.*\.)?layers\.\d+)\.(?:.*\.)?experts\.")
_ROUTED = re.compile(r"(?:^|\.)experts\.")
_SIDE = re.compile(r"^\.lora_(?P<side>[AB])(?:\.(?P<adapter>(?!weight$|bias$)[^.]+))?(?:\.weight)?$")
_WRAPPED = re.compile(r"\.(?:base_layer|token_adapter|modules_to_save(?:\.default)?|original_module|orig_module)(?=\.)")
"""parts of a name that PEFT's and kt-kernel's wrappers add"""
_ADAPTER_NAME = re.compile(r"\.(lora_(?:A|B|embedding_A|embedding_B|magnitude_vector))\.(?!weight$|bias$)[^.]+(?=\.|$)")


class ExpertKey(NamedTuple):
    """Where one expert LoRA tensor belongs."""

    layer: int
    expert: int | None
    """None: all experts of the layer"""
    projection: str
    """``gate``, ``up``, ``down``, or ``gate_up``: gate's rows and up's, as the model stores them"""
    side: str
    """``a`` [r, in] or ``b`` [out, r]; of all experts [E, r, in] or [E, out, r]"""


def parse_expert_key(key: str) -> ExpertKey | None:
    """The layer, expert, projection and side of a LoRA tensor on routed experts; None for any other tensor.

    >>> parse_expert_key("base_model.model.model.layers.1.mlp.original_moe.experts.5.gate_proj.lora_A.weight")
    ExpertKey(layer=1, expert=5, projection='gate', side='a')
    >>> parse_expert_key("model.layers.3.block_sparse_moe.experts.0.w2.lora_B.default.weight")
    ExpertKey(layer=3, expert=0, projection='down', side='b')
    >>> parse_expert_key("model.layers.3.mlp.experts.gate_up_proj.lora_A.weight")
    ExpertKey(layer=3, expert=None, projection='gate_up', side='a')
    >>> parse_expert_key("base_model.model.model.layers.1.mlp.shared_experts.gate_proj.lora_A.weight") is None
    True
    """
    if (match := _EXPERT.match(key)) is None or (side := _SIDE.match(match["rest"])) is None:
        return None
    number = match["expert"] or match["number"]
    projection = _PROJECTION_NAMES[match["projection"] or match["list"]]
    return ExpertKey(int(match["layer"]), int(number) if number else None, projection, side["side"].lower())


def is_placeholder(key: str, shape: tuple[int, ...]) -> bool:
    """Whether a tensor is the empty one that Tinker writes for gate or up, of experts that have but one of them."""
    found = parse_expert_key(key)
    return shape == (0,) and found is not None and found.projection in ("gate", "up")


def belongs_to_experts(key: str) -> bool:
    """Whether the tensor is inside a routed-experts module, also if :func:`parse_expert_key` does not know it."""
    return _ROUTED.search(key) is not None


def expert_module(key: str) -> str:
    """The module that a tensor on routed experts belongs to, without PEFT's prefix.

    >>> expert_module("base_model.model.model.layers.1.mlp.experts.5.gate_proj.lora_A.weight")
    'model.layers.1.mlp.experts.5.gate_proj'
    """
    match = _EXPERT.match(key)
    if match is None:
        raise ValueError(f"not an expert tensor: {key}")
    return match["module"].removeprefix(PEFT_PREFIX)


def layer_module(key: str) -> str | None:
    """The decoder layer of a tensor on routed experts, without PEFT's prefix; None where its name has none.

    >>> layer_module("base_model.model.model.layers.1.mlp.experts.5.gate_proj.lora_A.weight")
    'model.layers.1'
    """
    match = _LAYER.match(key)
    return match["layer"].removeprefix(PEFT_PREFIX) if match else None


def split_module(key: str) -> tuple[str, str]:
    """Split a PEFT tensor name into module and rest, without PEFT's prefix, the names of its wrappers and the adapter's name.

    >>> split_module("base_model.model.model.layers.0.self_attn.q_proj.lora_A.default.weight")
    ('model.layers.0.self_attn.q_proj', 'lora_A.weight')
    >>> split_module("base_model.model.lm_head.base_layer.weight")
    ('lm_head', 'weight')
    """
    name = _WRAPPED.sub("", _ADAPTER_NAME.sub(r".\1", key.removeprefix(PEFT_PREFIX)))
    module, found, rest = name.partition(".lora_")
    if found:
        rest = f"lora_{rest}"
        return module, rest if "." in rest or rest.startswith("lora_embedding") else f"{rest}.weight"
    module, _, rest = name.rpartition(".")
    return module, rest
