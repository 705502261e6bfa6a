"""Bytes of a model's weights that are still to come: in memory, and of them those that a token reads."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from math import prod
from typing import Any

from torch import nn

from ...adapters import AdapterSet
from ...checkpoint.discovery import ExpertsModule
from ...checkpoint.formats import Format
from ...checkpoint.layout import Stored
from ...checkpoint.opening import MoEModel
from ...decoding.quantized_linear import quantizable
from ...engines.base import Engine
from ...engines.options import EngineOptions
from ...ground.errors import KTModelError
from ...native.packed import Packing
from ..bench.memory import active

PLAIN = 16
"""bits of weights that are not quantized, whatever their dtype"""


@dataclass(frozen=True)
class Weights:
    """Bytes."""

    memory: int
    token: Mapping[int, int]
    """bits of a weight -> bytes that a token reads"""
    loading: int = 0
    """on top while they are loaded"""


def experts_weights(experts: Sequence[ExpertsModule], engine: type[Engine], itemsize: float) -> Weights:
    """Of the routed experts, as an engine keeps them.

    Args:
        itemsize: bytes of a weight as the engine reads it from the checkpoint.
    """
    each = [(info, engine.memory(info.shape, 0, itemsize, EngineOptions())) for info in experts]
    bits = engine.bits or (PLAIN if itemsize >= 2 else 8 if itemsize >= 1 else 4)
    token = sum(active(layer.weights, info) for info, layer in each)
    return Weights(
        sum(layer.weights for _, layer in each), {bits: token}, max(layer.loading for _, layer in each)
    )  # fmt: skip


def dense_weights(model: Any, experts: Sequence[ExpertsModule], bits: int | None) -> Weights:
    """Of everything else. A token reads all but the embedding, which counts where it is the output layer too.

    Args:
        model: empty, after :func:`~...decoding.latent_attention.keep_latents`.
        bits: as ``kt_dense`` has it, None for ``same``.
    """
    routed = {f"{info.name}.{name}" for info in experts for name in (*info.weights, *info.biases)}
    kept = {id(t): t for name, t in chain(model.named_parameters(), model.named_buffers()) if name not in routed}
    owners = Counter(id(p) for _, p in model.named_parameters(remove_duplicate=False))
    embedding, packed = model.get_input_embeddings().weight, 0
    quantized = quantizable(model, {info.name: info.shape.num_experts for info in experts}) if bits else set()
    for layer in quantized:
        weight: Any = layer.weight
        rows, cols = weight.shape
        packed += Packing(f"int{bits}").nbytes(rows, cols)
        owners[id(weight)] -= 1
        if not owners[id(weight)]:
            kept.pop(id(weight), None)
    output = model.get_output_embeddings()
    read_as_output = output is not None and output.weight is embedding and output not in quantized
    plain = sum(tensor.nbytes for tensor in kept.values())
    token = {PLAIN: plain - (0 if read_as_output else embedding.nbytes)}
    return Weights(plain + packed, token | ({bits: packed} if bits else {}))


@dataclass(frozen=True)
class LoraBytes:
    """An adapter in memory, as float32."""

    experts: int
    others: int
    token: int
    """bytes that a token reads"""


def lora_bytes(opened: MoEModel, adapters: AdapterSet, engine: type[Engine]) -> LoraBytes:
    """Check that the adapters fit, and add them up.

    Raises:
        KTAdapterError: They were made for another model.
    """
    parts = opened.fit(adapters, resizes=True)
    others = sum(
        4 * prod(adapter.store.infos[name].shape) for adapter, part in parts for lora in part.lora.values() for name in lora.tensors.values()
    )  # fmt: skip
    each = [
        (info, engine.memory(info.shape, adapters.rank(info.layer), 2, EngineOptions()).lora)
        for info in opened.experts
    ]  # fmt: skip
    return LoraBytes(sum(size for _, size in each), others, others + sum(active(size, info) for info, size in each))


def stored_experts(opened: MoEModel, form: Format, packed: bool) -> Stored:
    """How the experts' weights are stored: by the files' headers, or by what ``config.json`` says where there are no files.

    Args:
        packed: for an engine that takes quantized ones as they are.

    Raises:
        KTModelError: The files' headers do not fit the model.
    """
    if opened.files:
        return opened.layout.stored(packed=packed)
    if not packed or not form.parts:
        return Stored()
    info = opened.experts[0]
    return Stored(sum(_expert_bytes(info, form)) / (info.shape.num_weights // info.shape.num_experts))


def _expert_bytes(info: ExpertsModule, form: Format) -> list[int]:
    """Of each of an expert's weights, in the format."""
    sizes = []
    for projection in info.shape.projections:
        name = f"{info.name}.0.{projection}_proj.weight"
        try:
            wanted = form.wanted(name, info.shape.projection(projection), {})
        except LookupError as error:
            raise KTModelError(
                f"{form.title}: config.json alone does not say how many bits the experts' weights have. Give a folder with the model's files."
            ) from error
        sizes.append(
            sum(prod(part.shapes[0]) * _ITEMSIZES.get(part.dtypes[0], 2) for part in wanted.values() if part.shapes)
        )
    return sizes


_ITEMSIZES = {"F32": 4, "I32": 4, "I64": 8, "F16": 2, "BF16": 2, "I8": 1, "U8": 1, "F8_E4M3": 1, "F8_E8M0": 1}
"""bytes of safetensors' dtypes"""


def parameters(model: nn.Module) -> int:
    """All weights of a model."""
    return sum(parameter.numel() for parameter in model.parameters())


def disk_bytes(opened: MoEModel, form: Format) -> int:
    """Of the checkpoint's files; where there are none, of what they will hold, but for what is quantized around the experts."""
    if opened.files:
        return sum(file.stat().st_size for file in opened.files)
    names = {f"{info.name}.{name}" for info in opened.experts for name in info.weights}
    model: Any = opened.model
    others = sum(p.nbytes for name, p in model.named_parameters() if name not in names)
    itemsize = stored_experts(opened, form, packed=True).itemsize if form.parts else model.dtype.itemsize
    return int(others + sum(info.shape.num_weights for info in opened.experts) * itemsize)
