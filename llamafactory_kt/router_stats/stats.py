"""What the routers of a running model have chosen: counts per layer, with balance and variance."""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import Any, overload

import numpy as np
from rich.console import Console
from rich.table import Table

from ..ground.errors import KTModelError, name_some
from ..model.state import kt_state

ENOUGH = 4.0
"""tokens per expert, on average, below which an uneven load may be chance and is not called high"""


@dataclass(frozen=True)
class LayerStats:
    """Router statistics of one layer. Arrays are indexed by expert."""

    layer: int
    tokens: int
    """tokens that went through the router, padding not counted"""
    prompt_tokens: int
    """those of them that are of prompts; the others are of answers"""
    prompt_counts: np.ndarray
    """[E] int64: tokens of prompts that were routed to each expert"""
    answer_counts: np.ndarray
    """[E] int64: the same for answers"""
    prompt_weights: np.ndarray
    """[E] float64: sum of the routing weights of tokens of prompts"""
    answer_weights: np.ndarray
    """[E] float64: the same for answers"""

    @property
    def counts(self) -> np.ndarray:
        """[E] int64: tokens that were routed to each expert."""
        counts: np.ndarray = self.prompt_counts + self.answer_counts
        return counts

    @property
    def weights(self) -> np.ndarray:
        """[E] float64: sum of the routing weights."""
        weights: np.ndarray = self.prompt_weights + self.answer_weights
        return weights

    @property
    def balance(self) -> np.ndarray:
        """[E] float64: each expert's tokens over the mean of all; 1.0 everywhere is perfectly even, 0 is idle."""
        mean = self.counts.mean()
        balance: np.ndarray = self.counts / mean if mean else np.zeros(len(self.counts))
        return balance

    @property
    def variance(self) -> float:
        """Variance of ``counts`` over the experts (of the whole set, not estimated)."""
        return float(self.counts.var())

    @property
    def high_variance(self) -> bool:
        """Whether the load is very uneven: a standard deviation above the mean, with at least :data:`ENOUGH` tokens per
        expert on average."""
        mean = float(self.counts.mean())
        return mean >= ENOUGH and self.variance > mean**2

    @property
    def idle(self) -> list[int]:
        """Experts that got no token."""
        return [int(expert) for expert in np.flatnonzero(self.counts == 0)]

    @property
    def warning(self) -> str | None:
        """``Expert load balance variance: 1250.5 (high variance)``, or None."""
        return f"Expert load balance variance: {self.variance:.1f} (high variance)" if self.high_variance else None

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain JSON values."""
        arrays = ("prompt_counts", "answer_counts", "prompt_weights", "answer_weights", "counts", "weights", "balance")
        return {
            "layer": self.layer,
            "tokens": self.tokens,
            "prompt_tokens": self.prompt_tokens,
            **{name: getattr(self, name).tolist() for name in arrays},
            "variance": self.variance,
            "high_variance": self.high_variance,
            "idle": self.idle,
        }


@overload
def get_router_stats(model: Any, layer_idx: None = None) -> dict[int, LayerStats]: ...
@overload
def get_router_stats(model: Any, layer_idx: int) -> LayerStats: ...
def get_router_stats(model: Any, layer_idx: int | None = None) -> dict[int, LayerStats] | LayerStats:
    """What the routers have chosen since the model was loaded or :func:`reset_router_stats` was called.

    Args:
        model: a model with KT experts that was loaded with ``kt_router_stats: true`` or
            ``KTExpertsConfig(router_stats=True)``; PEFT-wrapped models included.
        layer_idx: a MoE layer; None for all of them.

    Raises:
        KTModelError: Nothing is counted, or the layer is not a MoE layer.
    """
    counters = _counters(model)
    if layer_idx is None:
        return {layer: _read(layer, counter) for layer, counter in counters.items()}
    if layer_idx not in counters:
        raise KTModelError(f"layer {layer_idx} is not a MoE layer; those of this model are {name_some(counters, 100)}.")
    return _read(layer_idx, counters[layer_idx])


def reset_router_stats(model: Any) -> None:
    """Count from zero again.

    Raises:
        KTModelError: Nothing is counted.
    """
    for counter in _counters(model).values():
        counter.reset()


def print_router_stats(model: Any) -> None:
    """Print :func:`router_table` to stdout."""
    print(router_table(get_router_stats(model)))


def router_table(stats: dict[int, LayerStats]) -> str:
    """One row a layer, and below it the layers whose load is very uneven; plain text."""
    first = next(iter(stats.values()))
    answers = first.tokens - first.prompt_tokens
    table = Table(
        "layer", "busiest experts (tokens)", "balance", "variance", "idle",
        title=f"Experts: {first.tokens} tokens ({first.prompt_tokens} of prompts, {answers} of answers)",
        title_justify="left",
    )  # fmt: skip
    for layer, entry in stats.items():
        counts, balance = entry.counts, entry.balance
        order = np.argsort(-counts, kind="stable")[:4]
        table.add_row(
            str(layer),
            ", ".join(f"{expert} ({counts[expert]})" for expert in order if counts[expert]) or "-",
            f"{balance.min():.2f} to {balance.max():.2f}",
            f"{entry.variance:.1f}",
            f"{len(entry.idle)} of {len(counts)}",
        )
    console = Console(file=io.StringIO(), width=110, color_system=None)
    console.print(table)
    lines = [console.file.getvalue().rstrip()]  # type: ignore[attr-defined]
    lines += [f"layer {layer}: {entry.warning}" for layer, entry in stats.items() if entry.warning]
    return "\n".join(lines)


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
