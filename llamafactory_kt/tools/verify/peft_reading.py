"""What PEFT itself makes of an adapter's dense part: it merges the adapter, in float32, into the weights of the checkpoint's files.

Nothing of how this package reads configurations, ranks, scalings, saved modules or tied embeddings is in it: a skeleton has the modules that
the file has tensors for, by the file's own names, and PEFT loads the file into it.
"""

from __future__ import annotations

import dataclasses
import re

import torch
from peft import LoraConfig, PeftModel
from peft.utils import set_peft_model_state_dict
from torch import nn

from ...adapters import Adapter
from ...adapters.keys import split_module
from ...ground.errors import KTAdapterError, name_some

_DROPPED = {
    "target_parameters", "exclude_modules", "layers_to_transform", "layers_pattern", "megatron_config", "megatron_core", "auto_mapping",
}  # fmt: skip
"""keys that choose modules, of routed experts too; and those with which PEFT imports code"""


class Skeleton(nn.Module):
    """Modules by their names, with what PEFT asks a transformers model for.

    Args:
        ties: output layer -> embeddings, where the model's configuration ties them.
    """

    def __init__(self, modules: dict[str, nn.Module], embeddings: str, ties: dict[str, str]):
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


def read_by_peft(adapter: Adapter, modules: dict[str, nn.Module], embeddings: str, ties: dict[str, str]) -> nn.Module:
    """The modules with the adapter merged into them by PEFT.

    Args:
        modules: float32, by the names of the file's time: those that the adapter has tensors for, those tied to them, and the embeddings.
        embeddings: the input embeddings among them.
    """
    torch.manual_seed(0)
    lora = sorted({split_module(name)[0] for name in adapter.other_names if ".lora_" in name})
    known = {field.name for field in dataclasses.fields(LoraConfig)} - _DROPPED
    raw = {key: value for key, value in adapter.settings.raw.items() if key in known}
    # which modules have LoRA is what the file says; all that is about them is PEFT's reading
    targets = [f"^{re.escape(name)}$" for name in lora] or ["^$"]
    config = LoraConfig(**raw | {"target_modules": "|".join(targets), "inference_mode": True, "task_type": None})
    skeleton = Skeleton(modules, embeddings, ties)
    if not lora:  # PEFT wants a target
        skeleton.add_module("none", nn.Linear(1, 1))
        config.target_modules = {"none"}
    model = PeftModel(skeleton, config)
    found = set_peft_model_state_dict(model, {name: adapter.read(name) for name in adapter.other_names})
    if found.unexpected_keys:
        raise KTAdapterError(f"{adapter.store.path}: PEFT has no place for {name_some(found.unexpected_keys, 3)}.")
    merged: nn.Module = model.merge_and_unload()
    return merged
