"""``adapter_config.json``: ranks, scalings, and what an adapter claims to be."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import regex
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ..ground.errors import KTAdapterError, name_some, printable
from ..ground.json_files import problems, read_json_object
from ..ground.tensors.stores import is_there

CONFIG = "adapter_config.json"
_SECONDS = 1.0
"""that one pattern may take for one name"""
_VARIANT = re.compile(r"^use_|_config$")
"""by PEFT's convention, what changes the computation is called so"""
_NO_VARIANT = {
    "use_rslora", "use_dora", "loftq_config", "eva_config", "corda_config", "lora_ga_config", "velora_config", "megatron_config",
    "runtime_config",
}  # fmt: skip
"""computed here; or settings of training alone, of the start of training, and of where PEFT computes"""
_KEEP_BASE = {"gaussian", "orthogonal", "eva", "mica"}
"""values of ``init_lora_weights`` with which PEFT (``tuners/lora/layer.py``, 0.18 and 0.21) leaves the base weight as it is"""

logger = logging.getLogger(__name__)

Rank = Annotated[int, Field(ge=1, le=65_536)]
Alpha = Annotated[float, Field(ge=-1e6, le=1e6)]


class _Keys(BaseModel):
    """The keys that decide what the tensors mean, with PEFT's types."""

    model_config = ConfigDict(strict=True, extra="ignore")

    r: Rank = 8
    lora_alpha: Alpha = 8.0
    use_rslora: bool | None = False
    use_dora: bool | None = False
    rank_pattern: dict[str, Rank] | None = None
    alpha_pattern: dict[str, Alpha] | None = None
    lora_bias: bool | None = False
    bias: Literal["none", "all", "lora_only"] | None = "none"
    target_modules: list[str] | str | None = None
    target_parameters: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    trainable_token_indices: list[int] | dict[str, list[int]] | None = None
    init_lora_weights: bool | str | None = True
    lora_B_layout: Literal["rank_major", "grouped_by_expert"] | None = None
    base_model_name_or_path: str | None = None
    peft_version: str | None = None


class LoraSettings:
    """The part of a PEFT LoraConfig that decides what the tensors mean (peft 0.18, ``tuners/lora/config.py``).

    ``raw`` has all keys; messages name the file ``path``.

    Raises:
        KTAdapterError: A value has another type than in PEFT, or changes the computation in a way that is not computed here.
    """

    def __init__(self, path: Path, raw: dict[str, Any]):
        self.path, self.raw = path, raw
        keys = self._checked(raw)
        self.r: int = keys.r
        self.lora_alpha: float = keys.lora_alpha
        self.use_rslora, self.use_dora, self.lora_bias = (
            bool(keys.use_rslora),
            bool(keys.use_dora),
            bool(keys.lora_bias),
        )
        self.rank_pattern, self.alpha_pattern = keys.rank_pattern or {}, keys.alpha_pattern or {}
        self.base_model = keys.base_model_name_or_path
        self.target_modules = keys.target_modules
        targets = keys.target_parameters or []
        self.target_parameters = [targets] if isinstance(targets, str) else targets
        self.modules_to_save: list[str] = keys.modules_to_save or []
        self.trainable_token_indices = keys.trainable_token_indices or {}
        self._ranks, self._alphas = (
            _Patterns(path, name, pattern)
            for name, pattern in (("rank_pattern", self.rank_pattern), ("alpha_pattern", self.alpha_pattern))
        )
        if variants := list(self._variants()):
            raise KTAdapterError(
                f"{path}: {name_some(variants)} is set: it makes of the adapter something else than LoRA, DoRA and rsLoRA, which alone are "
                "computed here. Merge it into the model with the PEFT that trained it, and load the merged model."
            )
        if not self._keeps_base(keys.init_lora_weights):
            raise KTAdapterError(
                f"{path}: init_lora_weights: {keys.init_lora_weights}. Training with it changed the base model's weights too, and the file does "
                "not hold by how much. Convert the adapter to plain LoRA: LLaMA-Factory with pissa_convert: true writes it to pissa_converted; "
                "in PEFT, save_pretrained(DIR, path_initial_model_for_weight_conversion=START) with the adapter as it was before training. If "
                "the model that you load is the changed base, set init_lora_weights to true in this file."
            )

    @classmethod
    def read(cls, path: Path) -> LoraSettings:
        """Read an adapter's configuration.

        Raises:
            KTAdapterError: It is missing, not JSON or not of a LoRA, or as the constructor.
        """
        if not is_there(path):
            raise KTAdapterError(
                f"{path} is missing: rank and lora_alpha of the adapter are unknown without it. {_beside(path.parent)}"
            )
        raw = read_json_object(path, KTAdapterError)
        if (kind := raw.get("peft_type", "LORA")) != "LORA":
            advice = (
                "It adds tokens to each prompt, which no weights can hold: train LoRA instead."
                if "num_virtual_tokens" in raw
                else "Merge it into the model with the PEFT that trained it (merge_and_unload), and load the merged model."
            )
            raise KTAdapterError(
                f"{path}: peft_type must be LORA, found {kind!r:.80}: only LoRA, DoRA and rsLoRA are computed here. {advice}"
            )
        return cls(path, raw)

    def _checked(self, raw: dict[str, Any]) -> _Keys:
        try:
            return _Keys.model_validate(raw)
        except ValidationError as error:
            raise KTAdapterError(f"{self.path}: {problems(error)}.") from error

    def _variants(self) -> Iterator[str]:
        """Keys that are set and change the computation."""
        if self.raw.get("layer_replication"):
            yield "layer_replication"
        if self.raw.get("alora_invocation_tokens"):
            yield "alora_invocation_tokens"
        for key, value in self.raw.items():
            if value and _VARIANT.search(key) and key not in _NO_VARIANT:
                yield printable(key)

    @staticmethod
    def _keeps_base(start: bool | str | None) -> bool:
        return not isinstance(start, str) or start.lower() in _KEEP_BASE

    def expected_rank(self, module: str) -> int:
        """The rank that PEFT gives the module, by its name when it was trained: from ``rank_pattern``, else ``r``."""
        return int(self._ranks.find(self._target(module), self.r))

    def alpha(self, module: str) -> float:
        """``alpha_pattern``'s for the module, by its name when it was trained, else ``lora_alpha``."""
        return self._alphas.find(self._target(module), self.lora_alpha)

    def _target(self, module: str) -> str:
        """What the patterns are about: the module, or its weight if that is among ``target_parameters`` (``_inject_parameters``)."""
        weight = f"{module}.weight"
        return weight if any(f".{weight}".endswith(f".{name}") for name in self.target_parameters) else module

    def scaling(self, module: str, rank: int) -> float:
        """``alpha / rank``, with rsLoRA ``alpha / sqrt(rank)`` (peft 0.18, ``LoraLayer.update_layer``)."""
        return self.alpha(module) / (math.sqrt(rank) if self.use_rslora else rank)

    def saves(self, module: str) -> bool:
        """Whether the module, by its name when it was trained, or one around it is among ``modules_to_save``, which get weights of their
        own (peft 0.18, ``_set_trainable``).

        Raises:
            KTAdapterError: Two are, one inside the other: PEFT saves both under one name, and cannot load them.
        """
        parts = module.split(".")
        around = [".".join(parts[:end]) for end in range(1, len(parts) + 1)]
        saved = [name for name in around if any(name.endswith(end) for end in self.modules_to_save)]
        if len(saved) > 1:
            raise KTAdapterError(
                f"{self.path}: {saved[1]} is inside {saved[0]}, and modules_to_save has both: PEFT saves one weight under the name of two. "
                "Train with one of them."
            )
        return bool(saved)


def _beside(directory: Path) -> str:
    """What a directory without a configuration holds instead, and what to do."""
    if (directory / "config.json").is_file() and any(directory.glob("*model*.safetensors")):
        return "The directory holds a whole model, not an adapter: give it as model_name_or_path, without an adapter."
    inner = sorted(file.parent.name for file in directory.glob(f"*/{CONFIG}"))
    return (
        f"There are adapters in its folders {name_some(inner)}: give one of them."
        if inner
        else f"It holds {name_some(sorted(file.name for file in directory.iterdir())) or 'nothing'}."
    )


class _Patterns:
    """``rank_pattern`` or ``alpha_pattern``: the first key that a module's name ends with, as a regular expression
    (``peft.utils.other.get_pattern_key``). The ``regex`` package has a time limit."""

    def __init__(self, path: Path, name: str, values: dict[str, Any]):
        self._path, self._name = path, name
        self._found: dict[str, float | None] = {}
        try:
            self._values = [(regex.compile(rf"(.*\.)?({key})$"), value) for key, value in values.items()]
        except (regex.error, RecursionError, OverflowError) as error:
            raise KTAdapterError(
                printable(f"{path}: {name} has a key that is no regular expression: {error}.")
            ) from error

    def find(self, module: str, default: float) -> float:
        if not self._values:
            return default
        if module not in self._found:
            self._found[module] = self._match(module)
        found = self._found[module]
        return default if found is None else found

    def _match(self, module: str) -> float | None:
        try:
            return next((value for key, value in self._values if key.match(module, timeout=_SECONDS)), None)
        except TimeoutError as error:
            raise KTAdapterError(
                f"{self._path}: a regular expression in {self._name} takes more than {_SECONDS:g} s for the name {module}."
            ) from error
