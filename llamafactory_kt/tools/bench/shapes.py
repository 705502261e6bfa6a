"""Layer sizes of published models, from their ``config.json`` on the hub."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ...ground.errors import KTConfigError

_DEEPSEEK: dict[str, Any] = {
    "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "rms_norm_eps": 1e-6,
}  # fmt: skip
_SHAPES: dict[str, dict[str, Any]] = {
    # deepseek-ai/DeepSeek-V2-Lite
    "deepseek-v2-lite": {
        **_DEEPSEEK, "model_type": "deepseek_v2", "vocab_size": 102400, "hidden_size": 2048, "intermediate_size": 10944,
        "moe_intermediate_size": 1408, "num_hidden_layers": 27, "num_attention_heads": 16, "num_key_value_heads": 16,
        "n_routed_experts": 64, "n_shared_experts": 2, "num_experts_per_tok": 6, "first_k_dense_replace": 1,
        "q_lora_rank": None, "topk_method": "greedy", "n_group": 1, "topk_group": 1, "norm_topk_prob": False,
        "routed_scaling_factor": 1.0,
    },
    # deepseek-ai/DeepSeek-V3, in BF16 and without its multi-token prediction layer
    "deepseek-v3": {
        **_DEEPSEEK, "model_type": "deepseek_v3", "vocab_size": 129280, "hidden_size": 7168, "intermediate_size": 18432,
        "moe_intermediate_size": 2048, "num_hidden_layers": 61, "num_attention_heads": 128, "num_key_value_heads": 128,
        "n_routed_experts": 256, "n_shared_experts": 1, "num_experts_per_tok": 8, "first_k_dense_replace": 3,
        "q_lora_rank": 1536, "n_group": 8, "topk_group": 4, "norm_topk_prob": True, "routed_scaling_factor": 2.5,
    },
    # mistralai/Mixtral-8x7B-v0.1
    "mixtral-8x7b": {
        "model_type": "mixtral", "vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 14336,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "num_local_experts": 8,
        "num_experts_per_tok": 2, "rms_norm_eps": 1e-5, "sliding_window": None,
    },
    # Qwen/Qwen3-30B-A3B
    "qwen3-30b-a3b": {
        "model_type": "qwen3_moe", "vocab_size": 151936, "hidden_size": 2048, "intermediate_size": 6144,
        "moe_intermediate_size": 768, "num_hidden_layers": 48, "num_attention_heads": 32, "num_key_value_heads": 4,
        "head_dim": 128, "num_experts": 128, "num_experts_per_tok": 8, "norm_topk_prob": True, "decoder_sparse_step": 1,
        "rms_norm_eps": 1e-6,
    },
}  # fmt: skip
_POSITIONS = 32768
"""max_position_embeddings of the synthetic models; the published ones scale their rotary embedding to reach further"""


@dataclass(frozen=True)
class ModelShape:
    """A published model's layer sizes, with a chosen number of layers."""

    name: str
    """for example ``deepseek-v2-lite-4``; ``deepseek-v2-lite-4x16`` with fewer experts"""
    model_type: str
    values: dict[str, Any]
    """keys of config.json"""


def parse_shape(text: str, experts: int | None = None) -> ModelShape:
    """Parse ``deepseek-v2-lite`` or ``deepseek-v2-lite:4``; the number counts all layers, dense ones included.

    Args:
        experts: routed experts a layer; None for all. A token chooses as many as in the published model.

    Raises:
        KTConfigError: The name is unknown, the layers leave none with experts, or the experts are too few or too many to choose from.
    """
    name, colon, number = text.strip().lower().partition(":")
    if name not in _SHAPES:
        raise KTConfigError(
            f"--synthetic: unknown model {name!r}, expected {', '.join(_SHAPES)}, each with :LAYERS for fewer layers."
        )
    values = {**_SHAPES[name], "max_position_embeddings": _POSITIONS, "tie_word_embeddings": False}
    model_type, dense = values.pop("model_type"), values.get("first_k_dense_replace", 0)
    if colon:
        most = values["num_hidden_layers"]
        if not number.isdecimal() or not dense < int(number) <= most:
            because = f" (its first {dense} have no routed experts)" if dense else ""
            raise KTConfigError(f"--synthetic: {name} takes {dense + 1} to {most} layers{because}, found {number!r}.")
        values["num_hidden_layers"] = int(number)
    own = f"{name}-{values['num_hidden_layers']}"
    if experts is not None:
        _set_experts(name, values, experts)
        own += f"x{experts}"
    return ModelShape(own, model_type, values)


def _set_experts(name: str, values: dict[str, Any], experts: int) -> None:
    key = next(key for key in ("num_experts", "n_routed_experts", "num_local_experts") if key in values)
    most, chosen, groups = values[key], values["num_experts_per_tok"], values.get("n_group", 1)
    each = -(-chosen // values.get("topk_group", 1))  # a token chooses among the experts of some groups
    least = groups * max(each, 2 if groups > 1 else 1)  # a group's score is the sum of its two best
    if experts % groups or not least <= experts <= most:
        steps = f", in steps of {groups}" if groups > 1 else ""
        raise KTConfigError(
            f"--experts: {name} takes {least} to {most} experts{steps} (a token chooses {chosen}), found {experts}."
        )
    values[key] = experts
