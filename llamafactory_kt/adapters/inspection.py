"""What an adapter holds, by its headers and, if asked for, by its values."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, field
from math import isfinite
from typing import Any

from tqdm.auto import tqdm

from ..ground.errors import KTAdapterError
from ..ground.tensors.stores import all_finite
from .adapter import Adapter
from .expert_lora import ExpertsShape
from .keys import split_module

GROUPS = ("attention", "shared experts", "dense MLP", "router", "routed experts", "other")


@dataclass
class Group:
    """The tensors of one kind of module."""

    tensors: int = 0
    nbytes: int = 0
    dtypes: dict[str, int] = field(default_factory=dict)
    settings: list[str] = field(default_factory=list)
    """the distinct ``r / alpha / scaling`` of its modules"""
    not_finite: list[str] | None = None
    """tensors with NaN or Inf; None if values were not read"""


@dataclass
class Inspection:
    """What :func:`inspect_adapter` found."""

    path: str
    format: str
    base: str | None
    r: int
    lora_alpha: float
    use_rslora: bool
    target_modules: Any
    tensors: int
    nbytes: int
    groups: dict[str, Group]
    layers: dict[int, int]
    """layer -> number of its experts; empty if the files do not tell"""
    norms: dict[int, list[float]] | None = None
    """layer -> ‖ΔW‖ of each expert; None if values were not read"""

    def to_dict(self) -> dict[str, Any]:
        """For JSON, which has no NaN: such norms become None."""
        norms: Any = self.norms and {n: [x if isfinite(x) else None for x in row] for n, row in self.norms.items()}
        return {**asdict(self), "norms": norms}


def group_of(module: str) -> str:
    """The kind of a module that is not of routed experts.

    >>> group_of("model.layers.0.self_attn.q_proj"), group_of("model.layers.3.mlp.shared_experts.up_proj")
    ('attention', 'shared experts')
    >>> group_of("model.layers.3.mlp.gate"), group_of("model.layers.0.mlp.gate_proj"), group_of("lm_head")
    ('router', 'dense MLP', 'other')
    """
    parts = module.split(".")
    if any(part.startswith("shared_expert") for part in parts) and parts[-1] != "shared_expert_gate":
        return "shared experts"
    if any("attn" in part or part == "attention" for part in parts):
        return "attention"
    if parts[-1] in ("gate", "router", "shared_expert_gate"):
        return "router"
    return "dense MLP" if any(part in ("mlp", "feed_forward") for part in parts) else "other"


def inspect_adapter(
    adapter: Adapter, values: bool = False, shapes: dict[int, ExpertsShape] | None = None
) -> Inspection:
    """Look into an adapter.

    Args:
        values: also read every tensor, for NaN and Inf and for the norm of each expert's ΔW.
        shapes: the model's experts per layer, if the adapter alone does not tell them.
    """
    groups: dict[str, Group] = {}
    settings, infos, experts = adapter.settings, adapter.store.infos, set(adapter.expert_names)
    pairs: dict[str, Counter[str]] = {}
    for name, info in tqdm(infos.items(), "Reading tensors", delay=1.0, leave=False, disable=None if values else True):
        module, part = split_module(name)
        kind = "routed experts" if name in experts else group_of(module)
        group = groups.setdefault(kind, Group(not_finite=[] if values else None))
        group.tensors += 1
        group.nbytes += info.nbytes
        group.dtypes[info.dtype] = group.dtypes.get(info.dtype, 0) + 1
        if group.not_finite is not None and not all_finite(adapter.read(name)):
            group.not_finite.append(name)
        if name not in experts and part == "lora_A.weight":
            rank = info.shape[0]
            scaling = settings.scaling(module, rank)
            alpha = scaling * (rank**0.5 if settings.use_rslora else rank)
            pairs.setdefault(kind, Counter())[f"{rank} / {alpha:g} / {scaling:g}"] += 1
    for layer in adapter.layers:
        rank, scaling = adapter.rank(layer), adapter.scaling(layer)
        pairs.setdefault("routed experts", Counter())[f"{rank} / {scaling * rank:g} / {scaling:g}"] += 1
    for kind, counts in pairs.items():
        groups[kind].settings = [text for text, _ in counts.most_common()]
    try:
        shapes = shapes or (adapter.own_shapes() if adapter.layers else {})
    except KTAdapterError:
        shapes = None  # one fused weight alone does not tell the number of experts
    norms = None
    if values and shapes is not None:
        layers = tqdm(adapter.layers, "Measuring layers", delay=1.0, leave=False)
        norms = {layer: adapter.read_layer(layer, shapes[layer]).norms().tolist() for layer in layers}
    return Inspection(
        path=str(adapter.directory),
        format=adapter.format,
        base=settings.raw.get("base_model_name_or_path"),
        r=settings.r,
        lora_alpha=settings.lora_alpha,
        use_rslora=settings.use_rslora,
        target_modules=settings.target_modules,
        tensors=len(infos),
        nbytes=sum(info.nbytes for info in infos.values()),
        groups={kind: groups[kind] for kind in GROUPS if kind in groups},
        layers={layer: shapes[layer].num_experts for layer in adapter.layers} if shapes is not None else {},
        norms=norms,
    )
