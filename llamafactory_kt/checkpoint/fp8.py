"""FP8 checkpoints with a scale per block of weights, as DeepSeek-V3 and R1 are published.

Each weight in float8_e4m3fn [out, in] comes with ``weight_scale_inv`` [ceil(out / 128), ceil(in / 128)]. A weight is the stored
number times the scale of its block (README_WEIGHTS.md of DeepSeek-V3). Blocks at the lower and right edges may be smaller, as
in ``kv_a_proj_with_mqa`` of the official checkpoints (576 rows); transformers 5.6 cannot dequantize those.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..ground.errors import KTModelError, name_some

FP8 = "F8_E4M3"
"""safetensors' name of float8_e4m3fn"""
SCALE_SUFFIX = "_scale_inv"
_SCALE_TYPES = ("F32", "BF16", "F16")

Block = tuple[int, int]
"""rows and columns that share a scale"""


def block_size(stored: Any) -> Block | None:
    """The block size of an FP8 checkpoint; None for a checkpoint that is not quantized.

    Args:
        stored: a model configuration's ``quantization_config``, a dictionary or transformers' object.

    Raises:
        KTModelError: The checkpoint is quantized in another way.
    """
    if getattr(stored, "quant_method", None) == "kt_experts":  # ours replaces the checkpoint's own
        stored = stored.checkpoint
    if not stored:
        return None
    values: dict[str, Any] = stored if isinstance(stored, dict) else stored.to_dict()
    method = str(getattr(values.get("quant_method"), "value", values.get("quant_method")))
    if method != "fp8":
        raise KTModelError(
            f"The model is a quantized checkpoint (quant_method: {method} in config.json); use_kt takes bfloat16, float16 and "
            "float32 checkpoints, and FP8 with a scale for each block. Use one of these."
        )
    block, form = values.get("weight_block_size"), values.get("fmt", "e4m3")
    if not (isinstance(block, list | tuple) and len(block) == 2 and all(isinstance(n, int) and n > 0 for n in block)):
        raise KTModelError(
            f"The FP8 checkpoint has weight_block_size: {block} in config.json; two sizes such as [128, 128] are needed. One scale "
            "for a whole matrix or row is not supported."
        )
    if form != "e4m3":
        raise KTModelError(f"The FP8 checkpoint has fmt: {form} in config.json; only e4m3 is supported.")
    return block[0], block[1]


def check_scales(tensors: Mapping[str, tuple[Sequence[int], str]], block: Block) -> None:
    """Check that each FP8 tensor has its scales.

    Args:
        tensors: name -> (shape, safetensors' dtype), of the whole checkpoint.

    Raises:
        KTModelError: Scales are missing, or have another shape or dtype; all are counted.
    """
    wrong = []
    for name, (shape, dtype) in tensors.items():
        if dtype != FP8:
            continue
        if len(shape) < 2:
            wrong.append(f"{name} is no matrix: {tuple(shape)}")
            continue
        wanted = (*shape[:-2], -(-shape[-2] // block[0]), -(-shape[-1] // block[1]))
        found = tensors.get(name + SCALE_SUFFIX)
        if found is None:
            wrong.append(f"{name + SCALE_SUFFIX} is missing")
        elif tuple(found[0]) != wanted or found[1] not in _SCALE_TYPES:
            wrong.append(f"{name + SCALE_SUFFIX} is {found[1]} {tuple(found[0])}, wanted F32 {wanted}")
    if wrong:
        raise KTModelError(
            f"The FP8 checkpoint has {len(wrong)} weights without the scales that weight_block_size {list(block)} asks for: "
            f"{name_some(wrong, 3)}. Check that all shards are there and that config.json belongs to them."
        )


def dequantize(weight: torch.Tensor, scale: torch.Tensor, block: Block) -> torch.Tensor:
    """Weight [out, in] in float8, scale [ceil(out / rows), ceil(in / columns)] -> [out, in], float32 on the same device."""
    values = weight.to(torch.float32)
    rows, columns = block
    for number, row in enumerate(scale.float()):
        values[number * rows : (number + 1) * rows] *= row.repeat_interleave(columns)[: values.shape[1]]
    return values
