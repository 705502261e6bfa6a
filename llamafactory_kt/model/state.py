"""What a model with KT experts is: one object, true after every switch of adapters."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from ..adapters import AdapterSet, ExpertsShape
from ..engines.base import Engine
from ..engines.options import EngineOptions
from ..engines.plan import Plan
from ..ground.errors import KTModelError, name_some
from ..native.cached_dense import CachedDense
from ..prompt_cache.pool import PromptPool
from .lock import ModelLock
from .on_gpu.placement import Placement

if TYPE_CHECKING:
    from .experts_module import KTExperts

_STATE = "_kt_state"


@dataclass(frozen=True)
class LoadReport:
    """What became of the tensors of one adapter, or of several together."""

    adapter: str
    format: str
    total: int
    """tensors in the files"""
    experts: int
    """tensors consumed by the experts"""
    peft: int
    """tensors consumed by PEFT"""
    left_out: int
    """tensors a narrow ``kt_lora_scope`` left out"""
    layers: tuple[int, ...]
    """layers whose experts got LoRA"""
    max_rank: int
    expert_params: int
    """LoRA parameters of the experts, as the files have them"""
    merged: bool = False
    """whether they were added to the weights for good"""

    def __str__(self) -> str:
        text = f"consumed {self.experts + self.peft} of {self.total} (PEFT {self.peft}, KT experts {self.experts})"
        if self.left_out:
            text += f", {self.left_out} left out by kt_lora_scope"
        rest = self.total - self.experts - self.peft - self.left_out
        return f"{text}, {rest} are not the experts'" if rest else text


@dataclass
class KTState:
    """The state of one model with KT experts; :func:`kt_state` finds it."""

    wrappers: list[KTExperts]
    """the experts modules, in order"""
    lock: ModelLock
    plan: Plan
    reason: str
    """why this plan was chosen; empty where there was no choice"""
    options: EngineOptions
    stored: str
    """how the checkpoint has the experts, as ``INT4``"""
    on_gpu: bool
    """a GPU computes all but the experts"""
    requested: AdapterSet
    """the adapters that the load was given and has checked; they are yet to be applied"""
    choices: dict[str, AdapterSet]
    """name -> adapters that may take their place, which have been checked with them"""
    merged: AdapterSet | None
    """those requested whose experts' part is in the weights for good; None where LoRA is exchangeable"""
    placement: Placement | None = None
    """which experts are on a GPU; None without ``kt_gpu_experts``"""
    adapters: AdapterSet = field(default_factory=AdapterSet)
    """the adapters in place, applied as a whole"""
    expert_adapters: AdapterSet = field(default_factory=AdapterSet)
    """those whose LoRA the experts have; others where ``load_moe_lora_from_adapter`` was called since"""
    report: LoadReport | None = None
    """what became of the tensors of what is in place; None without any"""
    held: dict[AdapterSet, Callable[[], None]] = field(default_factory=dict)
    """adapters that were in place and stay in memory -> how to put them back"""
    own_weights: dict[str, torch.Tensor] = field(default_factory=dict)
    """the model's own parameters and buffers, of those that the adapters in place have changed"""
    cached_dense: CachedDense | None = None
    """integers of the weights around the experts that ``kt_weight_path`` has"""
    optimized: bool = False
    """the layers around the experts are optimized for inference"""
    prompts: PromptPool | None = None
    """prompts and answers whose keys and values are kept; None where none are"""
    continues: str | None = None
    """how tokens go on with a cache (:mod:`..decoding.continuing`); None where nobody has asked"""
    lora_scope: str = "all"
    """``kt_lora_scope`` of the load, for adapters that a terminal chat applies later"""
    show_stats: bool = False
    """a terminal chat prints figures after each answer"""

    @property
    def engine(self) -> type[Engine]:
        """What computes the experts."""
        return type(self.wrappers[0].engine)

    def choice(self, name: str | None) -> AdapterSet:
        """The adapters that a name among the :attr:`choices` stands for; None: those that the load was given.

        Raises:
            KTModelError: There is no such name.
        """
        if name is None:
            return self.requested
        if name not in self.choices:
            raise KTModelError(
                f"There is no adapter called {name!r}; kt_adapters has {name_some(self.choices) or 'none'}."
            )
        return self.choices[name]

    def is_in_place(self, adapters: AdapterSet) -> bool:
        """Whether the model computes with just these adapters."""
        return adapters == self.adapters == self.expert_adapters

    @property
    def weights_key(self) -> Hashable:
        """Equal for the same adapters, applied in the same way."""
        left_out = self.report.left_out if self.report is not None else 0
        return (
            *(adapter.files for adapter in self.adapters.adapters),
            left_out,
            *(a.files for a in self.expert_adapters.adapters),
        )

    @property
    def shapes(self) -> dict[int, ExpertsShape]:
        """layer -> its experts' sizes."""
        return {wrapper.layer_idx: wrapper.info.shape for wrapper in self.wrappers}


def has_kt_experts(model: Any) -> bool:
    """Whether a model was loaded with KT experts; PEFT-wrapped ones included."""
    return _STATE in vars(plain_model(model)) if model is not None else False


def kt_state(model: Any) -> KTState:
    """A model's state; PEFT-wrapped models included.

    Raises:
        KTModelError: The model was not loaded with KTExpertsConfig.
    """
    if not has_kt_experts(model):
        raise KTModelError(
            f"{type(model).__name__} has no KT experts; load it with quantization_config=KTExpertsConfig() or use_kt: true."
        )
    state: KTState = vars(plain_model(model))[_STATE]
    return state


def set_kt_state(model: Any, state: KTState) -> None:
    """Make a plain model one with KT experts."""
    vars(model)[_STATE] = state


def plain_model(model: Any) -> Any:
    """Without PEFT's wrapper around it."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model
