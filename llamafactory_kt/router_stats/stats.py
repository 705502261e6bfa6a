"""Router statistics of a running model: per layer and expert, with balance and variance."""

from __future__ import annotations

import io
import operator
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from ..ground.errors import KTModelError, name_some
from ..ground.streams import terminal_width
from ..model.state import kt_state

MANY_LAYERS, WORST = 8, 3
"""from so many layers on, a summary comes first, with so many of the worst"""
MIN_MEAN_TOKENS = 4.0
"""mean tokens per expert below which an uneven load may be chance"""


@dataclass(frozen=True)
class LayerStats:
    """Router statistics of one layer. Arrays are indexed by expert."""

    layer: int
    tokens: int
    """tokens that the router has routed, without padding"""
    prompt_tokens: int
    """those in prompts; the others are in answers"""
    prompt_counts: NDArray[np.int64]
    """[E] int64: prompt tokens routed to each expert"""
    answer_counts: NDArray[np.int64]
    """[E] int64: the same for answers"""
    prompt_weights: NDArray[np.float64]
    """[E] float64: sum of the prompt tokens' routing weights"""
    answer_weights: NDArray[np.float64]
    """[E] float64: the same for answers"""

    @property
    def counts(self) -> NDArray[np.int64]:
        """[E] int64: tokens routed to each expert."""
        return self.prompt_counts + self.answer_counts

    @property
    def weights(self) -> NDArray[np.float64]:
        """[E] float64: sum of the routing weights."""
        return self.prompt_weights + self.answer_weights

    @property
    def balance(self) -> NDArray[np.float64]:
        """[E] float64: each expert's tokens over the layer's mean; 1.0 everywhere is perfectly even, 0 is idle."""
        counts = self.counts
        return counts / counts.mean() if counts.any() else np.zeros(len(counts))

    @property
    def variance(self) -> float:
        """Population variance of ``counts`` over the experts."""
        return float(self.counts.var())

    @property
    def high_variance(self) -> bool:
        """Whether the standard deviation is above the mean, with at least :data:`MIN_MEAN_TOKENS` tokens per expert."""
        mean = float(self.counts.mean())
        return mean >= MIN_MEAN_TOKENS and self.variance > mean**2

    @property
    def idle(self) -> list[int]:
        """Experts that got no token."""
        return [int(expert) for expert in np.flatnonzero(self.counts == 0)]

    @property
    def warning(self) -> str | None:
        """``Expert load balance variance: 1250.5 (high variance)``, or None."""
        return f"Expert load balance variance: {self.variance:.1f} (high variance)" if self.high_variance else None

    def __add__(self, other: LayerStats) -> LayerStats:
        """Both counts of the same layer together."""
        return self._with(other, operator.add)

    def __sub__(self, other: LayerStats) -> LayerStats:
        """What has been counted since an earlier look at the same layer."""
        return self._with(other, operator.sub)

    def _with(self, other: LayerStats, combine: Callable[[Any, Any], Any]) -> LayerStats:
        names = [field.name for field in fields(self) if field.name != "layer"]
        return LayerStats(self.layer, *(combine(getattr(self, name), getattr(other, name)) for name in names))

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain JSON values."""
        arrays = ("prompt_counts", "answer_counts", "prompt_weights", "answer_weights", "counts", "weights", "balance")
        return {
            "layer": self.layer, "tokens": self.tokens, "prompt_tokens": self.prompt_tokens,
            **{name: getattr(self, name).tolist() for name in arrays},
            "variance": self.variance, "high_variance": self.high_variance, "idle": self.idle,
        }  # fmt: skip


@overload
def get_router_stats(model: Any, layer_idx: None = None) -> dict[int, LayerStats]: ...
@overload
def get_router_stats(model: Any, layer_idx: int) -> LayerStats: ...
def get_router_stats(model: Any, layer_idx: int | None = None) -> dict[int, LayerStats] | LayerStats:
    """Read the counts since the model was loaded or :func:`reset_router_stats` was called.

    Args:
        model: a model with KT experts, PEFT-wrapped or not, loaded with ``kt_router_stats: true`` or
            ``KTExpertsConfig(router_stats=True)``.
        layer_idx: a MoE layer; None for all of them.

    Raises:
        KTModelError: The model does not count, or the layer is not a MoE layer.
    """
    counters = _counters(model)
    if layer_idx is None:
        return {layer: _read(layer, counter) for layer, counter in counters.items()}
    if layer_idx not in counters:
        raise KTModelError(f"layer {layer_idx} is not a MoE layer; those of this model are {name_some(counters, 100)}.")
    return _read(layer_idx, counters[layer_idx])


def reset_router_stats(model: Any) -> None:
    """Set all counts to zero.

    Raises:
        KTModelError: The model does not count.
    """
    for counter in _counters(model).values():
        counter.reset()


def counts_experts(model: Any) -> bool:
    """Whether a model with KT experts counts what its routers choose."""
    return all(wrapper.router_counts is not None for wrapper in kt_state(model).wrappers)


def counted_since(before: Mapping[int, LayerStats], now: Mapping[int, LayerStats]) -> dict[int, LayerStats]:
    """What was counted between two looks at a model; all of ``now`` if its counts were reset in between."""
    return {
        layer: e - before[layer] if layer in before and before[layer].tokens <= e.tokens else e
        for layer, e in now.items()
    }


def print_router_stats(model: Any) -> None:
    """Print :func:`router_table` to stdout."""
    print(router_table(get_router_stats(model)))


def router_table(stats: dict[int, LayerStats]) -> str:
    """Plain text: a summary, one row per layer, and below the table the layers whose load is very uneven."""
    first = next(iter(stats.values()))
    answers = first.tokens - first.prompt_tokens
    table = Table(
        "layer", "busiest experts (tokens)", "balance", "variance", "idle", title_justify="left",
        title=f"Experts: {first.tokens} tokens ({first.prompt_tokens} of prompts, {answers} of answers)",
    )  # fmt: skip
    for layer, entry in stats.items():
        counts, balance = entry.counts, entry.balance
        order = np.argsort(-counts, kind="stable")[:4]
        busiest = ", ".join(f"{expert} ({counts[expert]})" for expert in order if counts[expert]) or "-"
        table.add_row(
            str(layer), busiest, f"{balance.min():.2f} to {balance.max():.2f}", f"{entry.variance:.1f}",
            f"{len(entry.idle)} of {len(counts)}",
        )  # fmt: skip
    out = io.StringIO()
    Console(file=out, width=terminal_width(110), color_system=None).print(table)
    warnings = [f"layer {layer}: {entry.warning}" for layer, entry in stats.items() if entry.warning]
    return "\n".join([*_summary(stats), re.sub(" +$", "", out.getvalue(), flags=re.M).rstrip(), *warnings])


def _summary(stats: dict[int, LayerStats]) -> list[str]:
    """All layers in a few lines, the least even ones by name; none of a model that is seen at a glance."""
    if len(stats) < MANY_LAYERS or not next(iter(stats.values())).tokens:
        return []
    idle, experts = sum(len(entry.idle) for entry in stats.values()), sum(len(entry.counts) for entry in stats.values())
    uneven = sorted(stats.values(), key=lambda entry: -float(entry.balance.std()))
    worst = "; ".join(
        f"{entry.layer} (expert {int(entry.balance.argmax())} with {entry.balance.max():.1f} times the mean, {len(entry.idle)} idle)"
        for entry in uneven[:WORST]
    )
    return [
        f"{len(stats)} layers: {idle} of {experts} experts got no token; the busiest got {max(e.balance.max() for e in uneven):.1f} times the "
        f"mean of its layer.",
        f"Least even layers: {worst}. Most even: {uneven[-1].layer} (up to {uneven[-1].balance.max():.1f} times).",
    ]


def _counters(model: Any) -> dict[int, Any]:
    counters = {wrapper.layer_idx: wrapper.router_counts for wrapper in kt_state(model).wrappers}
    if None in counters.values():
        raise KTModelError(
            "What the routers choose is not counted; load the model with kt_router_stats: true, or "
            "KTExpertsConfig(router_stats=True)."
        )
    return counters


def _read(layer: int, counter: Any) -> LayerStats:
    tokens, counts, weights = counter.snapshot()
    return LayerStats(layer, int(tokens.sum()), int(tokens[0]), counts[0], counts[1], weights[0], weights[1])
