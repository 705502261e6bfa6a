"""Checkpoints quantized as other programs do it. Each packer rounds to the nearest, and returns what is stored and the numbers that
this stands for, by plain sums over the format's description."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

Packed = tuple[dict[str, torch.Tensor], torch.Tensor]
"""(stored tensors by what follows the module's name, the weight that they stand for)"""
Packer = Callable[[torch.Tensor], Packed]

AWQ_ORDER = [0, 2, 4, 6, 1, 3, 5, 7]


def words(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Integers [n, count] -> int32 [n, count * bits / 32], the first in the lowest bits."""
    shifts = torch.arange(0, 32, bits, dtype=torch.int64)
    sums = (codes.to(torch.int64).view(len(codes), -1, len(shifts)) << shifts).sum(-1)
    return (sums - ((sums >> 31) << 32)).to(torch.int32)


def affine(weight: torch.Tensor, group: int, order: torch.Tensor, dtype: torch.dtype):
    """4-bit codes [out, in], scales and zero points [out, groups], and the rounded weight."""
    count = weight.shape[1] // group
    low = torch.stack([weight[:, order == g].amin(1) for g in range(count)], 1).clamp(max=0)
    high = torch.stack([weight[:, order == g].amax(1) for g in range(count)], 1).clamp(min=0)
    scale = ((high - low) / 15).clamp(min=1e-4).to(dtype)
    zero = (-low / scale.float()).round().clamp(0, 15)
    codes = (weight / scale.float()[:, order] + zero[:, order]).round().clamp(0, 15)
    return codes, scale, zero, (codes - zero[:, order]) * scale.float()[:, order]


def gptq(group: int = 32, *, version: int = 1, ordered: bool = True) -> Packer:
    """Args:
    ordered: by activations, so that the columns of a group stand anywhere; otherwise ``g_idx`` is not stored.
    """

    def pack(weight: torch.Tensor) -> Packed:
        order = torch.arange(weight.shape[1]) // group
        order = order[torch.randperm(weight.shape[1])] if ordered else order
        codes, scale, zero, rounded = affine(weight, group, order, torch.float16)
        zero = zero.clamp(min=1) if version == 1 else zero  # as 0 - 1 cannot be stored alone
        rounded = (codes - zero[:, order]) * scale.float()[:, order]
        stored = {
            "qweight": words(codes, 4).T.contiguous(), "scales": scale.T.contiguous(),
            "qzeros": words((zero - int(version == 1)).T, 4),
        }  # fmt: skip
        return stored | ({"g_idx": order.to(torch.int32)} if ordered else {}), rounded

    return pack


def awq(group: int = 32) -> Packer:
    def pack(weight: torch.Tensor) -> Packed:
        order = torch.arange(weight.shape[1]) // group
        codes, scale, zero, rounded = affine(weight, group, order, torch.float16)

        def ordered(columns: torch.Tensor) -> torch.Tensor:
            return words(columns.view(len(columns), -1, 8)[..., AWQ_ORDER].flatten(1), 4)

        return {"qweight": ordered(codes.T), "qzeros": ordered(zero.T), "scales": scale.T.contiguous()}, rounded

    return pack


def compressed(scheme: dict, dtype: torch.dtype = torch.bfloat16) -> Packer:
    """By the library compressed-tensors itself.

    Args:
        scheme: a ``config_group``.
        dtype: of the scales, to which the library also rounds the weights.
    """
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationScheme
    from compressed_tensors.quantization.utils import calculate_qparams

    found = QuantizationScheme(**{key: value for key, value in scheme.items() if key != "format"})
    compressor = BaseCompressor.get_value_from_registry(scheme["format"])
    args = found.weights

    def pack(weight: torch.Tensor) -> Packed:
        strategy = scheme["weights"]["strategy"]
        order = torch.arange(weight.shape[1])
        if scheme["weights"].get("actorder") == "group":
            order = torch.randperm(weight.shape[1])
        if strategy == "group":
            parts, dims = weight[:, order].view(len(weight), -1, args.group_size), -1
        elif strategy == "channel":
            parts, dims = weight.unsqueeze(1), -1
        else:
            parts, dims = weight, None
        if strategy == "block":
            rows, columns = args.block_structure
            tall = torch.nn.functional.pad(weight, (0, -weight.shape[1] % columns, 0, -weight.shape[0] % rows))
            parts, dims = tall.view(tall.shape[0] // rows, rows, -1, columns).transpose(1, 2), (-1, -2)
        scale, zero = calculate_qparams(parts.amin(dims), parts.amax(dims), args)
        scale = scale.reshape(-1, 1) if strategy in ("channel", "tensor") else scale
        zero = zero.reshape(scale.shape)
        scale = scale.to(dtype)
        state = {"weight": weight, "weight_scale": scale}
        if not args.symmetric:
            state["weight_zero_point"] = zero.to(torch.int8)
        if scheme["weights"].get("actorder") == "group":
            state["weight_g_idx"] = (torch.argsort(order) // args.group_size).to(torch.int32)
        stored = compressor.compress(state, found)
        return stored, compressor.decompress(stored, found)["weight"].float()

    return pack


def mxfp4(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """[..., out, in] -> blocks [..., out, in / 32, 16], scales [..., out, in / 32], the rounded weight."""
    values = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    groups = weight.unflatten(-1, (-1, 32))
    exponent = (groups.abs().amax(-1).clamp(min=1e-6) / 6).log2().ceil()
    scaled = groups / 2 ** exponent.unsqueeze(-1)
    code = (scaled.abs().unsqueeze(-1) - values).abs().argmin(-1)
    rounded = (values[code] * scaled.sign() * 2 ** exponent.unsqueeze(-1)).flatten(-2)
    code = code + 8 * (scaled < 0)
    blocks = (code[..., 0::2] | code[..., 1::2] << 4).to(torch.uint8)
    return blocks, (exponent + 127).to(torch.uint8), rounded


def nvfp4(names: tuple[str, str, str] = ("weight_packed", "weight_scale", "weight_global_scale")) -> Packer:
    """As compressed-tensors stores it, or by ModelOpt's names, whose last scale is one by the other's."""

    def pack(weight: torch.Tensor) -> Packed:
        values = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
        groups = weight.unflatten(-1, (-1, 16))
        factor = (groups.abs().amax() / (6 * 448)).reshape(1)
        scale = (groups.abs().amax(-1) / (6 * factor)).clamp(min=0.01).to(torch.float8_e4m3fn)
        last = factor if names[2] == "weight_scale_2" else 1 / factor
        whole = scale.float() * last if last is factor else scale.float() / last
        codes = (groups.div(whole.unsqueeze(-1)).abs().unsqueeze(-1) - values).abs().argmin(-1)
        rounded = (values[codes] * groups.sign() * whole.unsqueeze(-1)).flatten(-2)
        codes = (codes + 8 * (groups < 0)).flatten(-2)
        packed = (codes[:, 0::2] | codes[:, 1::2] << 4).to(torch.uint8)
        return dict(zip(names, (packed, scale, last), strict=True)), rounded

    return pack


def split_experts(directory: Path, *, transposed: bool = False) -> Path:
    """Store a checkpoint's fused experts as one tensor per expert and projection, as quantizers do."""
    file = directory / "model.safetensors"
    tensors = load_file(file)
    for name in [name for name in tensors if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        experts, (block, _, weight) = tensors.pop(name), name.rpartition(".")
        for number, expert in enumerate(experts.transpose(1, 2) if transposed else experts):
            halves = (
                zip(("gate_proj", "up_proj"), expert.chunk(2), strict=True) if "gate" in weight else [(weight, expert)]
            )
            tensors |= {f"{block}.{number}.{projection}.weight": part.contiguous() for projection, part in halves}
    save_file(tensors, file, metadata={"format": "pt"})
    return directory


def quantized_checkpoint(
    directory: Path, source: Path, pack: Packer, quantization: dict, wanted: Callable[[str], bool]
) -> tuple[Path, Path]:
    """Quantize weights of a float32 checkpoint, and store beside it what they stand for, in float32. Returns both.

    Args:
        pack: takes the weight of a module.
        quantization: goes into ``config.json``.
        wanted: whether to quantize the weight of this name.
    """
    torch.manual_seed(1)
    packed, plain = {}, {}
    for name, weight in load_file(source / "model.safetensors").items():
        packed[name] = plain[name] = weight
        if wanted(name):
            del packed[name]
            stored, plain[name] = pack(weight)
            packed |= {name.removesuffix("weight") + ending: tensor for ending, tensor in stored.items()}
    return save_both(directory, source, packed, plain, quantization)


def save_both(directory: Path, source: Path, packed: dict, plain: dict, quantization: dict) -> tuple[Path, Path]:
    for kind, tensors in (("packed", packed), ("plain", plain)):
        shutil.copytree(source, directory / kind, ignore=shutil.ignore_patterns("*.safetensors"))
        tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
        save_file(tensors, directory / kind / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text()) | {"quantization_config": quantization}
    (directory / "packed" / "config.json").write_text(json.dumps(config))
    return directory / "packed", directory / "plain"
