"""What PEFT itself makes of an adapter's dense part: it merges the adapter, in float32, into the weights of the checkpoint's files.

Nothing of how this package reads configurations, ranks, scalings, saved modules or tied embeddings is in it: a skeleton has the modules that
the file has tensors for, by the file's own names, and PEFT loads the file into it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType

import torch
from peft import LoraConfig, PeftModel
from peft.utils import set_peft_model_state_dict
from torch import nn

from ...adapters.config import LoraSettings
from ...adapters.keys import split_module
from ...ground.errors import KTAdapterError, name_some

_DROPPED = {
    "target_parameters", "exclude_modules", "layers_to_transform", "layers_pattern", "megatron_config", "megatron_core", "auto_mapping",
}  # fmt: skip
"""keys that choose modules, of routed experts too; and those with which PEFT imports code"""
_NO_EMBEDDINGS = "no_embeddings"


class Skeleton(nn.Module):
    """Modules by their names, with what PEFT asks a transformers model for.

    Args:
        ties: output layer -> embeddings, where the model's configuration ties them.
    """

    def __init__(self, modules: dict[str, nn.Module], embeddings: str, ties: Mapping[str, str]):
        super().__init__()
        for name, module in modules.items():
            parent: nn.Module = self
            *path, leaf = name.split(".")
            for part in path:
                if not hasattr(parent, part):
                    parent.add_module(part, nn.Module())
                parent = parent.get_submodule(part)
            parent.add_module(leaf, module)
        self.config = {"model_type": "custom", "tie_word_embeddings": bool(ties)}
        self._embeddings = embeddings
        self._tied_weights_keys = {f"{output}.weight": f"{source}.weight" for output, source in ties.items()}

    def get_input_embeddings(self) -> nn.Module:
        """As transformers' models."""
        return self.get_submodule(self._embeddings)


class Weights(nn.Module):
    """A module that is neither linear nor an embedding: its parameters alone."""

    def __init__(self, parameters: dict[str, torch.Tensor]):
        super().__init__()
        for name, value in parameters.items():
            self.register_parameter(name, nn.Parameter(value, requires_grad=False))


def read_by_peft(
    settings: LoraSettings,
    tensors: Mapping[str, torch.Tensor],
    modules: dict[str, nn.Module],
    embeddings: str = _NO_EMBEDDINGS,
    ties: Mapping[str, str] = MappingProxyType({}),
) -> nn.Module:
    """The modules with an adapter merged into them by PEFT.

    Args:
        settings: of which all keys go to PEFT, but for those that choose modules: that is what the tensors say.
        tensors: by PEFT's names.
        modules: float32, by the names of the file's time: those that there are tensors for, those tied to them, and the embeddings.
        embeddings: the input embeddings among them.
        ties: output layer -> embeddings, where the model's configuration ties them.
    """
    torch.manual_seed(0)
    if embeddings == _NO_EMBEDDINGS:
        modules[embeddings] = nn.Embedding(1, 1)
    lora = sorted({split_module(name)[0] for name in tensors if ".lora_" in name})
    if not lora:  # PEFT wants a target
        modules["none"], lora = nn.Linear(1, 1), ["none"]
    known = {field.name for field in dataclasses.fields(LoraConfig)} - _DROPPED
    raw = {key: value for key, value in settings.raw.items() if key in known}
    config = LoraConfig(**raw | {"target_modules": lora, "inference_mode": True, "task_type": None})
    model = PeftModel(Skeleton(modules, embeddings, ties), config)
    found = set_peft_model_state_dict(model, dict(tensors))
    if found.unexpected_keys:
        raise KTAdapterError(f"{settings.path}: PEFT has no place for {name_some(found.unexpected_keys, 3)}.")
    merged: nn.Module = model.merge_and_unload()
    return merged
