"""This package's integers: the experts of each layer, and the weights around them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import torch

from ...checkpoint.formats import FLOATS
from ...checkpoint.opening import MoEModel
from ...checkpoint.reader import LayerTensors
from ...checkpoint.stored import StoredTensor, opened
from ...decoding.latent_attention import keep_latents
from ...decoding.quantized_linear import quantizable
from ...engines.native.integer_files import (
    EXPERTS,
    ExpertsRecord,
    dense_directory,
    dense_record,
    dense_size,
    layer_directory,
    layer_size,
    write_blocks,
)
from ...engines.native.integers import IntegerEngine
from ...ground.errors import KTModelError
from ...ground.paging import drop_pages
from ...native.packed import Packing
from ...native.packed_block import quantize_into
from ...peft_side.model_names import tied_weights
from .parts import Part


def integer_layer(engine: type[IntegerEngine], tensors: LayerTensors, target: Path) -> Part:
    """What to write for a layer's experts."""
    module = tensors.module
    size = layer_size(module.shape, engine.packing())

    def blocks() -> Iterator[tuple[str, torch.Tensor]]:
        block = torch.zeros(size, dtype=torch.uint8)
        for _ in engine.quantized(tensors.experts(), block, module.shape, module.layer):
            pass
        yield EXPERTS, block

    record = ExpertsRecord.of(engine.name, module.shape, tensors.fingerprint())
    return Part(layer_directory(target, module.layer), record, size[0] * size[1], _writing([EXPERTS], blocks))


def dense_part(weights: Sequence[StoredTensor], target: Path, bits: int) -> Part:
    """What to write for the weights around the experts."""
    packing = Packing(f"int{bits}")
    sizes = {tensor.name: dense_size(tensor, packing) for tensor in weights}

    def blocks() -> Iterator[tuple[str, torch.Tensor]]:
        read = opened()
        for tensor in weights:
            weight, block = read(tensor), torch.zeros(sizes[tensor.name], dtype=torch.uint8)
            try:
                quantize_into(block, packing, [weight])
            except ValueError as error:
                raise KTModelError(
                    f"{tensor.file}: {tensor.name} has {error}. Download or copy the checkpoint again."
                ) from error
            yield tensor.name, block
            drop_pages(weight)

    nbytes = sum(size for (size,) in sizes.values())
    return Part(dense_directory(target, bits), dense_record(weights, packing), nbytes, _writing(list(sizes), blocks))


def _writing(
    names: Sequence[str], blocks: Callable[[], Iterable[tuple[str, torch.Tensor]]]
) -> Callable[[Path], Iterable[Path]]:
    return lambda directory: write_blocks(directory, names, blocks())


def dense_weights(moe: MoEModel) -> list[StoredTensor]:
    """The weights that ``kt_dense`` quantizes, as the checkpoint has them: those that transformers reads as they are stored. Others, of
    quantized checkpoints for one, are quantized by each load.

    Args:
        moe: its model is empty, and used up.
    """
    model, renamed = moe.model, moe.layout.renamed
    ties = tied_weights(model)
    keep_latents(model)
    layers = quantizable(model, {module.name: module.shape.num_experts for module in moe.experts})
    own = {id(layer.weight) for layer in layers}
    found: dict[str, StoredTensor] = {}
    for name, weight in model.named_parameters(remove_duplicate=False):
        stored = [renamed[same] for same in {name, *ties.get(name, ())} if same in renamed]
        if id(weight) in own and len(stored) == 1 and stored[0].dtype in FLOATS:
            found[stored[0].name] = stored[0]
    return list(found.values())
