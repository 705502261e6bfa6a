"""Opening a checkpoint by its headers: its files, its empty model, its experts, and whether adapters fit them.

Everything that reads a checkpoint, or checks an adapter against a model, starts here. No weights are read.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..adapters import Adapter, AdapterSet, ExpertsShape
from ..adapters.keys import layer_module
from ..ground.errors import KTAdapterError, KTModelError, KTPathError, first_line
from ..ground.tensors.stores import shards
from ..peft_side.model_names import ModuleNames
from ..peft_side.part import PeftPart
from ..peft_side.split import check_peft_part
from .configuration import check_configuration, reading_configuration
from .discovery import find_experts, of_language
from .formats import check_file, format_of, quantization
from .layout import CheckpointLayout


class MoEModel:
    """A model with routed experts, and the files with its weights.

    Args:
        model: empty (on the meta device), or loaded by stock transformers.
        files: the checkpoint's safetensors files; only :attr:`layout` needs them.

    Raises:
        KTModelError: As :func:`find_experts`.
    """

    def __init__(self, model: nn.Module, files: Iterable[str | Path] = ()):
        self.model = model
        self.files = [Path(file) for file in files]
        self.experts = find_experts(model)
        """its experts modules, in order"""

    @property
    def shapes(self) -> dict[int, ExpertsShape]:
        """layer -> its experts' sizes, of layers with routed experts."""
        return {module.layer: module.shape for module in self.experts}

    @cached_property
    def layout(self) -> CheckpointLayout:
        """Where the files keep the experts; located on first use, while the experts modules are still in place.

        Raises:
            KTModelError: There are no files, or as :class:`CheckpointLayout`.
        """
        if not self.files:
            raise KTModelError(
                f"{type(self.model).__name__}: experts are read from checkpoint files, and there are none."
            )
        return CheckpointLayout(self.model, self.experts, self.files)

    def fit(self, adapters: AdapterSet, scope: str = "all", **options: bool) -> list[tuple[Adapter, PeftPart]]:
        """:func:`fit_adapters` for this model."""
        return fit_adapters(self.model, self.shapes, adapters, scope, **options)


def fit_adapters(
    model: nn.Module, shapes: Mapping[int, ExpertsShape], adapters: AdapterSet, scope: str = "all", *, finite: bool = False,
    resizes: bool = False,
) -> list[tuple[Adapter, PeftPart]]:  # fmt: skip
    """Check adapters against a model, the experts' part as well as PEFT's. Nothing is changed.

    Args:
        model: the plain model, without PEFT's wrapper; empty or loaded. Its experts may be replaced by KT experts.
        shapes: layer -> its experts' sizes.
        scope: as ``kt_lora_scope``.
        finite: also read the adapters' values, for NaN and Inf; otherwise only headers are read.
        resizes: the model's embeddings are yet to be resized.

    Returns:
        Each adapter with the part of it that PEFT gets, in order.

    Raises:
        KTAdapterError: An adapter was made for other experts; as :func:`check_peft_part`; values are NaN or Inf.
    """
    adapters.check_fits(shapes)
    check_layers(model, adapters)
    parts = [(adapter, check_peft_part(model, adapter, scope, resizes=resizes)) for adapter in adapters.adapters]
    for adapter in adapters.adapters if finite else ():
        adapter.check_finite()
    return parts


def check_layers(model: nn.Module, adapters: AdapterSet) -> None:
    """Check that LoRA on experts is of the layers whose experts the model has, by their whole names: a layer of the same number may be of
    a part that speaks, or predicts further tokens.

    Raises:
        KTAdapterError: It is of other layers.
    """
    names = ModuleNames(model)
    for adapter in adapters.adapters:
        layers = {layer: key for key in adapter.expert_names if (layer := layer_module(key))}
        wrong = [
            key
            for layer, key in layers.items()
            if (found := names.find(layer)) is None or not of_language(model, found)
        ]
        if wrong:
            raise KTAdapterError(
                f"{adapter.expert_file}: LoRA on experts in {len(wrong)} layers that {type(model).__name__} does not have, first {wrong[0]}. "
                f"Nothing is dropped silently: is the adapter meant for this model?{adapter.trained_for}"
            )


def open_checkpoint(directory: str | Path, *, quantized: bool = False) -> MoEModel:
    """Open a local checkpoint in safetensors.

    Args:
        directory: the checkpoint; ``~`` is expanded.
        quantized: also accept a quantized checkpoint, of the formats in :data:`~.formats.FORMATS`.

    Raises:
        KTPathError: There are no safetensors files, or no model that can be opened.
        KTModelError: The checkpoint is quantized, and that is not accepted; or as :func:`find_experts`.
    """
    files = weight_files(directory)
    if not files:
        raise KTPathError(f"{directory} is not a directory with safetensors files.")
    return MoEModel(empty_model(directory, quantized=quantized), files)


def weight_files(directory: str | Path) -> list[Path]:
    """A checkpoint's safetensors files: those in its index, else ``model.safetensors``, else all; none if there is no such directory.

    Raises:
        KTModelError: The index is damaged, or a file that it names is missing.
    """
    directory = Path(directory).expanduser()
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        return shards(index, KTModelError)
    if (whole := directory / "model.safetensors").is_file():  # as transformers chooses
        return [whole]
    return sorted(directory.glob("*.safetensors")) if directory.is_dir() else []


def thinker(config: Any) -> Any:
    """Of a model that thinks and talks (Qwen3-Omni), the part that thinks, which alone LLaMA-Factory chats with; others as they are. How
    the checkpoint is quantized goes with it."""
    part = getattr(config, "thinker_config", config)
    if part is not config:
        part.name_or_path = config.name_or_path
        if getattr(config, "quantization_config", None):
            part.quantization_config = config.quantization_config
    return part


def auto_class(config: Any) -> Any:
    """The class of transformers that loads a model, as LLaMA-Factory chooses it: with images where the model has them."""
    from transformers import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, AutoModelForCausalLM, AutoModelForImageTextToText

    with_images = type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    return AutoModelForImageTextToText if with_images else AutoModelForCausalLM


def empty_model(name: str | Path, *, quantized: bool = False) -> Any:
    """Build the model, as it is without quantization, on the meta device from its ``config.json``.

    Args:
        name: checkpoint directory (``~`` is expanded), or a name on the hub.
        quantized: also accept a quantized checkpoint; of any format, as no weights are read.

    Raises:
        KTPathError: There is no such model.
        KTModelError: The checkpoint is quantized, and that is not accepted; transformers cannot build it; or as
            :func:`~.formats.check_file`.
    """
    from transformers import AutoConfig

    directory = Path(name).expanduser()
    check_file(directory)
    place = directory if directory.is_dir() else name
    with reading_configuration(place):
        config = AutoConfig.from_pretrained(place, trust_remote_code=False)  # None would ask in the terminal
    check_configuration(place, config)
    if not quantized and quantization(config):
        title = format_of(config).title
        raise KTModelError(
            f"{name} is a quantized checkpoint ({title}); bfloat16, float16 or float32 weights are needed here. "
            "Use the model's unquantized checkpoint."
        )
    config = thinker(config)
    try:
        with torch.device("meta"):
            return auto_class(config).from_config(config)
    except Exception as error:  # of any kind: what transformers' classes make of the values
        raise KTModelError(
            f"{name}: transformers cannot build {config.model_type} from config.json: {type(error).__name__}: {first_line(error).rstrip('.')}. Correct "
            "config.json, if a value is wrong; else this transformers cannot run the model, with or without use_kt."
        ) from error
