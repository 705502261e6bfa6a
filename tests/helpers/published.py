"""``quantization_config`` as published checkpoints have it, shortened where lists go on."""

from __future__ import annotations

from typing import Any


def compressed_tensors(
    form: str, weights: dict[str, Any], inputs: dict[str, Any] | None, **more: Any
) -> dict[str, Any]:
    """As llm-compressor writes it, with every key."""
    common = {
        "actorder": None,
        "block_structure": None,
        "group_size": None,
        "observer": "minmax",
        "observer_kwargs": {},
    }
    group = {
        "input_activations": common | inputs if inputs else None, "output_activations": None, "targets": ["Linear"],
        "weights": common | {"dynamic": False, "symmetric": True} | weights,
    }  # fmt: skip
    return {
        "config_groups": {"group_0": group}, "format": form, "global_compression_ratio": None, "ignore": ["lm_head", "re:.*mlp.gate$"],
        "kv_cache_scheme": None, "quant_method": "compressed-tensors", "quantization_status": "compressed", "sparsity_config": {},
        "transform_config": {}, "version": "0.12.2",
    } | more  # fmt: skip


PER_TOKEN = {"dynamic": True, "num_bits": 8, "strategy": "token", "symmetric": True}
AUTO_ROUND = {
    "autoround_version": "0.12.2", "bits": 4, "block_name_to_quantize": "model.layers", "data_type": "int", "group_size": 32,
    "iters": 200, "low_gpu_mem_usage": True, "quant_method": "auto-round", "sym": True, "packing_format": "auto_round:auto_gptq",
    "extra_config": {"model.layers.0.mlp.gate": {"bits": 16, "data_type": "fp"}, ".*shared_expert.*": {"bits": 16}},
}  # fmt: skip
PUBLISHED: dict[str, dict[str, Any]] = {
    "DeepSeek-V3.1": {
        "activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "scale_fmt": "ue8m0", "weight_block_size": [32, 48],
    },
    "Qwen3-Coder-480B-A35B-Instruct-FP8": {
        "activation_scheme": "dynamic", "fmt": "e4m3", "modules_to_not_convert": ["lm_head", "model.layers.0.mlp.gate"],
        "quant_method": "fp8", "weight_block_size": [32, 48],
    },
    "MiniMax-M2": {
        "activation_scheme": "dynamic", "fmt": "float8_e4m3fn", "quant_method": "fp8", "weight_block_size": [32, 48],
        "modules_to_not_convert": ["gate", "e_score_correction_bias", "lm_head"],
    },
    "MiMo-V2-Flash": {
        "activation_scheme": "dynamic", "fmt": "e4m3", "ignored_layers": ["model.layers.0.self_attn.o_proj"], "quant_method": "fp8",
        "weight_block_size": [32, 48],
    },
    "Mixtral-8x7B-Instruct-v0.1-FP8": {"activation_scheme": "static", "ignored_layers": ["lm_head"], "quant_method": "fp8"},
    "Mixtral-8x7B-Instruct-v0.1-FP8 by ModelOpt": {
        "config_groups": {"group_0": {"input_activations": {"dynamic": False, "num_bits": 8, "type": "float"}, "targets": ["Linear"]}},
        "ignore": ["lm_head"], "producer": {"name": "modelopt", "version": "0.27.1"}, "quant_algo": "FP8", "quant_method": "modelopt",
    },
    "GLM-4.5-Air-FP8": compressed_tensors(
        "float-quantized", {"num_bits": 8, "strategy": "channel", "type": "float"}, PER_TOKEN | {"type": "float"}
    ),
    "Qwen3-30B-A3B-FP8-block": compressed_tensors(
        "float-quantized", {"block_structure": [32, 48], "num_bits": 8, "strategy": "block", "type": "float"},
        {"dynamic": True, "group_size": 128, "num_bits": 8, "strategy": "group", "type": "float"},
    ),
    "Qwen3-30B-A3B-quantized.w8a8": compressed_tensors(
        "int-quantized", {"num_bits": 8, "strategy": "channel", "type": "int"}, PER_TOKEN | {"type": "int"}
    ),
    "w8a8, static and asymmetric inputs": compressed_tensors(
        "int-quantized", {"num_bits": 8, "strategy": "tensor", "type": "int"},
        {"dynamic": False, "num_bits": 8, "strategy": "tensor", "symmetric": False, "type": "int"},
        kv_cache_scheme={"dynamic": False, "num_bits": 8, "strategy": "tensor", "symmetric": True, "type": "float"},
    ),
    "Qwen3-30B-A3B-quantized.w4a16": compressed_tensors(
        "pack-quantized", {"actorder": "weight", "group_size": 32, "num_bits": 4, "strategy": "group", "type": "int"}, None
    ),
    "w4a16, asymmetric, ordered by activations": compressed_tensors(
        "pack-quantized",
        {"actorder": "group", "group_size": 32, "num_bits": 4, "strategy": "group", "symmetric": False, "type": "int"}, None,
    ),
    "Kimi-K2-Thinking": compressed_tensors(
        "pack-quantized", {"group_size": 32, "num_bits": 4, "strategy": "group", "type": "int"}, None,
        ignore=["lm_head", "re:.*self_attn.*", "re:.*shared_experts.*", "re:.*mlp\\.(gate|up|gate_up|down)_proj.*"],
    ),
    "Qwen3-30B-A3B-NVFP4": compressed_tensors(
        "nvfp4-pack-quantized", {"group_size": 16, "num_bits": 4, "strategy": "tensor_group", "type": "float"},
        {"dynamic": "local", "group_size": 16, "num_bits": 4, "strategy": "tensor_group", "symmetric": True, "type": "float"},
    ),
    "DeepSeek-R1-NVFP4": {
        "ignore": ["lm_head", "model.layers.0.self_attn*"], "producer": {"name": "modelopt", "version": "0.33.0"},
        "quant_algo": "NVFP4", "group_size": 16, "kv_cache_scheme": {"dynamic": False, "num_bits": 8, "type": "float"},
        "quant_method": "modelopt",
    },
    "gpt-oss-120b": {"modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"], "quant_method": "mxfp4"},
    "Qwen3-30B-A3B-GPTQ-Int4": {
        "bits": 4, "checkpoint_format": "gptq", "damp_percent": 0.01, "desc_act": True, "group_size": 32, "lm_head": False,
        "model_file_base_name": None, "model_name_or_path": None, "quant_method": "gptq", "static_groups": False, "sym": True,
        "true_sequential": True,
    },
    "GPTQ-Int4-Int8Mix": {
        "bits": 4, "checkpoint_format": "gptq", "desc_act": True, "group_size": 32, "quant_method": "gptq", "sym": True,
        "dynamic": {"-:.*shared_expert.*": {}, "+:.*self_attn.*": {"bits": 8, "group_size": 32}}, "lm_head": False,
    },
    "Qwen3-30B-A3B-AWQ": {
        "bits": 4, "group_size": 32, "modules_to_not_convert": ["gate"], "quant_method": "awq", "version": "gemm", "zero_point": True,
    },
    "Qwen3-30B-A3B-int4-AutoRound": AUTO_ROUND,
    "OPEA, before version 0.5": {
        "backend": "auto_round:gptq:exllamav2", "bits": 4, "data_type": "int", "group_size": 32, "quant_method": "intel/auto-round",
    },
    "AutoRound as AWQ": AUTO_ROUND | {"packing_format": "auto_round:auto_awq", "sym": False},
}  # fmt: skip
