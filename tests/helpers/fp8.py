"""Checkpoints quantized to FP8 as DeepSeek's are."""

from __future__ import annotations

import json
import shutil

import torch
from safetensors.torch import load_file, save_file


def quantized(name: str) -> bool:
    """Whether DeepSeek quantizes this weight: every linear layer but the output layer and the routers."""
    plain = ("embed", "lm_head", "norm", ".gate.weight")
    return name.endswith(".weight") and not any(part in name for part in plain)


def blocks(weight: torch.Tensor, block: list[int]):
    rows, columns = block
    for i in range(0, weight.shape[0], rows):
        for j in range(0, weight.shape[1], columns):
            yield i // rows, j // columns, (slice(i, i + rows), slice(j, j + columns))


def make_fp8(directory, source, block):
    """Quantize a float32 checkpoint as DeepSeek does, and dequantize it again with a plain loop. Returns both."""
    fp8, plain = {}, {}
    for name, weight in load_file(source / "model.safetensors").items():
        fp8[name] = plain[name] = weight
        if not quantized(name) or weight.dim() != 2:
            continue
        stored = torch.zeros(weight.shape, dtype=torch.float8_e4m3fn)
        scale = torch.zeros(-(-weight.shape[0] // block[0]), -(-weight.shape[1] // block[1]))
        plain[name] = torch.zeros(weight.shape)
        for i, j, place in blocks(weight, block):
            scale[i, j] = weight[place].abs().max() / 448
            stored[place] = (weight[place] / scale[i, j]).to(torch.float8_e4m3fn)
            plain[name][place] = stored[place].float() * scale[i, j]
        fp8[name], fp8[f"{name}_scale_inv"] = stored, scale
    config = json.loads((source / "config.json").read_text())
    for kind, tensors in (("fp8", fp8), ("plain", plain)):
        shutil.copytree(source, directory / kind, ignore=shutil.ignore_patterns("*.safetensors"))
        save_file(tensors, directory / kind / "model.safetensors", metadata={"format": "pt"})
    config |= {
        "dtype": "bfloat16",
        "quantization_config": {
            "quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": block,
        },
    }  # fmt: skip
    (directory / "fp8" / "config.json").write_text(json.dumps(config))
    return directory / "fp8", directory / "plain"
