"""Small models of every MoE architecture that is tested, and the table of them in docs/architectures.md.

A row says what the experts compute, which engines can, and the lowest version of transformers that it was tested with. The tests
hold each row; ``python -m helpers.architectures`` (``make architectures``) writes the rows of the installed transformers.
"""

from __future__ import annotations

import copy
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from packaging.version import Version
from transformers import CONFIG_MAPPING, __version__

from llamafactory_kt import KTExpertsConfig, optimize_for_inference
from llamafactory_kt.checkpoint.discovery import find_experts
from llamafactory_kt.checkpoint.opening import auto_class
from llamafactory_kt.engines.native import NativeEngine
from llamafactory_kt.engines.registry import engines

from .places import ROOT

# Sizes differ wherever a mix-up could hide. A key goes to the architectures whose configuration knows it.
_SIZES: dict[str, Any] = {
    "vocab_size": 1024, "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 512, "initializer_range": 0.15,
    "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1,
    "num_experts": 6, "num_local_experts": 6, "n_routed_experts": 6, "moe_num_experts": 6, "num_experts_per_tok": 3,
    "moe_intermediate_size": 40, "shared_expert_intermediate_size": 80, "n_shared_experts": 1, "num_shared_experts": 1,
    "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1, "num_dense_layers": 1,
    "q_lora_rank": 24, "kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16,
    "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
    "index_n_heads": 2, "index_head_dim": 16, "index_topk": 64, "mamba_num_heads": 4, "mamba_head_dim": 16,
    "mamba_d_state": 8, "sliding_window": 16, "linear_num_heads": 4, "linear_head_dim": 16,
    "depth": 2, "num_heads": 4, "out_hidden_size": 64,
}  # fmt: skip
_MLA = {"num_key_value_heads": 4, "head_dim": 8}
_HYBRID = {"layer_types": ["linear_attention", "full_attention", "linear_attention"]}
_ONE_DENSE = {"mlp_layer_types": ["dense", "sparse", "sparse"]}
_INDEXED = {"layer_types": ["indexed_attention"] * 3, "indexer_types": ["full", "shared", "full"]}
_NEMOTRON = {"layers_block_type": ["attention", "moe", "moe"], "num_hidden_layers": None}
_QWEN4 = {
    "layer_types": ["linear_attention", "indexed_attention", "linear_attention"], "hc_lowrank": 8,
    "indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 64, "indexer_compress_ratio": 4,
}  # fmt: skip
_DOTS_NOTE = {**_MLA, **_ONE_DENSE, "layer_types": ["indexed_attention", "sliding_attention", "sliding_attention"]}
TINY: dict[str, dict[str, Any]] = {
    "afmoe": {},
    "aria": {"text_config": {"moe_topk": 3}},
    "aria_text": {"moe_topk": 3},
    "axk1": _MLA,
    "axk2": _MLA,
    "bailing_hybrid": {**_MLA, **_HYBRID},
    "beam": _ONE_DENSE,
    "cohere2_moe": {},
    "deepseek_ocr2": {"text_config": _ONE_DENSE},
    "deepseek_v2": {**_MLA, "topk_method": "greedy"},
    "deepseek_v3": _MLA,
    "deepseek_v32": _MLA,
    "deepseek_v4": {},
    "dots1": {},
    "dots3_note": {
        "text_config": _DOTS_NOTE, "audio_config": {"adapter_out_dim": 64, "adapter_input_size": 64},
        "vision_config": {"adapter_in_dim": 64, "adapter_out_dim": 64, "pyramid_num_routed": [0, 4, 5]},
    },
    "dots3_note_text": _DOTS_NOTE,
    "ernie4_5_moe": {},
    "exaone_moe": {},
    "flex_olmo": {},
    "flint": {},
    "gemma4_text": {
        "enable_moe_block": True, "top_k_experts": 3, "vocab_size_per_layer_input": 1024, "hidden_size_per_layer_input": 8,
        "global_head_dim": 16,
    },
    "glm4_moe": {},
    "glm4_moe_lite": _MLA,
    "glm5_next": {
        "text_config": {
            **_MLA, **_ONE_DENSE, "qk_rope_head_dim": 0, "indexer_types": ["full"] * 3,
            "layer_types": ["linear_attention", "indexed_attention", "linear_attention"],
        },
    },
    "glm_moe_dsa": {**_MLA, **_ONE_DENSE},
    "gpt_oss": {},
    "granitemoe": {},
    "granitemoe_swa": {},
    "granitemoehybrid": {**_HYBRID, "mamba_n_heads": 4},
    "granitemoeshared": {},
    "hunyuan_v1_moe": {},
    "hy_v3": {},
    "hy_v4": {},
    "hy_v4_vl": {
        "text_config": {
            **_MLA, **_ONE_DENSE, **_INDEXED,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]},
        },
    },
    "inkling_mm_model": {"text_config": _ONE_DENSE},
    "inkling_text": {},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 0, "use_mamba_kernels": False},
    "kimi_k25": {"text_config": _MLA},
    "kimi_linear": {**_MLA, **_HYBRID, "linear_head_dim": 16, "linear_num_heads": 4},
    "kolibri1": {},
    "laguna": {},
    "lara_mini": {},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"]},
    "llama4_text": {},
    "mellum": {},
    "mimo_v2_flash": {},
    "minimax": {},
    "minimax_m2": {},
    "minimax_m3_vl": {},
    "minimax_m3_vl_text": {},
    "mistral4": {"num_key_value_heads": 4, "head_dim": 24},
    "mistral_large4": {
        "text_config": {**_MLA, **_ONE_DENSE, **_INDEXED, "no_rope_layers": [1, 1, 0], "kv_source_layers": [0, 1, 2]}
    },
    "mixtral": {},
    "nemotron_h": _NEMOTRON,
    "nemotron_h_omni": {"text_config": _NEMOTRON, "vision_config": {"video_temporal_patch_size": 2}},
    "olmoe": {},
    "phimoe": {},
    "qwen2_moe": {},
    "qwen3_5_moe_text": _HYBRID,
    "qwen3_moe": {},
    "qwen3_next": _HYBRID,
    "qwen4_exp": {"text_config": _QWEN4},
    "qwen4_exp_text": _QWEN4,
    "sarvam_mla": _MLA,
    "sarvam_moe": {},
    "solar_open": {},
    "step3p7": {
        "text_config": {
            **_ONE_DENSE, "layer_types": ["full_attention", "sliding_attention", "full_attention"], "share_expert_dim": 80,
        },
    },
    "unlimited_ocr": {"text_config": _ONE_DENSE},
    "zaya": {"num_experts_per_tok": 1},
}  # fmt: skip


def tiny_config(model_type: str, **changes: Any) -> Any:
    """The configuration of a small model, with what else it can see and hear."""
    return _sized(CONFIG_MAPPING[model_type], {**TINY[model_type], **changes})


def _sized(kind: Any, changes: dict[str, Any]) -> Any:
    usual = kind()
    parts = {name: part for name in kind.sub_configs if (part := getattr(usual, name)) is not None}
    known = {*usual.to_dict(), *kind.attribute_map}
    return kind(
        **copy.deepcopy(
            {key: value for key, value in _SIZES.items() if key in known}
            | {key: value for key, value in changes.items() if key not in parts}
        ),
        **{name: _sized(type(part), changes.get(name, {})) for name, part in parts.items()},
    )


PAGES = [ROOT / "docs" / name for name in ("architectures.md", "architectures_zh.md")]
START = "|---|---|---|--:|"
"""the line before the first row"""
EXACT, EFFECT = 1e-5, 0.01
"""most error, and least effect of the experts, relative to the logits"""


@dataclass(frozen=True)
class Row:
    """One row of the table."""

    model_type: str
    formula: str
    engines: str
    transformers: str
    """lowest version that it was tested with"""

    def __str__(self) -> str:
        return f"| `{self.model_type}` | `{self.formula}` | {self.engines} | {self.transformers} |"


def rows(page: Path) -> dict[str, Row]:
    """The rows of a page, by architecture."""
    lines = (
        line.strip("| ").split(" | ")
        for line in page.read_text(encoding="utf-8").splitlines()
        if line.startswith("| `")
    )
    cells = ([cell.strip("`") for cell in line] for line in lines if len(line) == 4)
    return {row[0]: Row(*row) for row in cells if row[0] in TINY}


def tiny_model(model_type: str, **changes: Any) -> torch.nn.Module:
    """A random model in float32; the weights of no two experts are equal."""
    torch.manual_seed(0)
    config = tiny_config(model_type, **changes)
    model = auto_class(config).from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "bias" in name:
                parameter.normal_(0, 0.5)
            elif parameter.dim() >= 2:
                router = name.endswith((".gate.weight", ".router.weight"))
                parameter.normal_(0, 1.0 if router else parameter.shape[-1] ** -0.5)
    return model.eval()


@torch.inference_mode()
def errors(model: Any, directory: Path) -> tuple[Row, float, float]:
    """The row of a model, its logits' error in float32 as chats compute it (median of the tokens), and how much experts matter."""
    model.save_pretrained(directory)
    backend = "native" if NativeEngine.problem() is None else "torch"
    loaded = type(model).from_pretrained(
        directory, dtype=torch.float32, quantization_config=KTExpertsConfig(backend=backend)
    )
    optimize_for_inference(loaded)
    modules = find_experts(model)
    ids = torch.randint(2, 1000, (1, 48), generator=torch.Generator().manual_seed(1))
    wanted, found = model(input_ids=ids).logits, loaded(input_ids=ids).logits
    for module in modules:
        for weight in module.weights:
            getattr(model.get_submodule(module.name), weight).zero_()
    without = model(input_ids=ids).logits
    norm = wanted.norm(dim=-1)
    error, effect = (float(((other - wanted).norm(dim=-1) / norm).median()) for other in (found, without))
    [formula] = {module.formula for module in modules}
    able = ", ".join(engine.name for engine in engines() if not engine.cannot_compute(formula))
    return Row(model.config.model_type, str(formula), able, __version__), error, effect


def main() -> None:
    """Write the rows of the installed transformers; a row keeps a lower version."""
    table = rows(PAGES[0])
    for model_type in TINY:
        known = table.get(model_type)
        if model_type not in CONFIG_MAPPING or (known and Version(known.transformers) < Version(__version__)):
            continue
        with tempfile.TemporaryDirectory() as directory:
            try:
                row, error, effect = errors(tiny_model(model_type), Path(directory))
            except Exception as problem:
                print(f"{model_type}: {problem}")
                continue
        print(f"{row} off by {error:.1e}")
        if error < EXACT and effect > EFFECT:
            table[model_type] = row
    for page in PAGES:
        before, start, rest = page.read_text(encoding="utf-8").partition(START)
        page.write_text(
            before + start + "".join(f"\n{table[name]}" for name in sorted(table)) + rest[rest.index("\n\n") :],
            encoding="utf-8",
        )


if __name__ == "__main__":
    main()
