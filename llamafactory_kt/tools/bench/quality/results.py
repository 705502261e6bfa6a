"""How far next-token distributions are from the reference's.

Names and definitions are those of llama.cpp's ``llama-perplexity --kl-divergence`` (tools/perplexity/README.md): KLD is
``KL(reference || this)`` in nats, *same top p* the share of tokens for which both have the same most likely token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

_ROWS = 32
"""distributions that are compared at once, for the sake of memory"""


class TokenFigures(NamedTuple):
    """One entry for each token that was predicted."""

    losses: list[float]
    """negative log-likelihood, in nats"""
    klds: list[float]
    same_top: list[bool]

    @classmethod
    def of(cls, found: torch.Tensor, wanted: torch.Tensor, tokens: torch.Tensor) -> TokenFigures:
        """Compare log-probabilities with the reference's.

        Args:
            found, wanted: [N, vocabulary] float32.
            tokens: [N], those of the text.
        """
        klds = torch.cat([_kl(f, w) for f, w in zip(found.split(_ROWS), wanted.split(_ROWS), strict=True)])
        same = found.argmax(-1) == wanted.argmax(-1)
        return cls(losses(found, tokens), klds.tolist(), same.tolist())


def losses(log_probs: torch.Tensor, tokens: torch.Tensor) -> list[float]:
    """Negative log-likelihoods of the text's tokens."""
    found: list[float] = (-log_probs.gather(-1, tokens[:, None])[:, 0]).tolist()
    return found


def _kl(found: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    share = wanted.exp()
    terms = share * (wanted - found)
    terms[share == 0] = 0  # what the reference excludes adds nothing, even where both are -inf
    return terms.double().sum(-1)


@dataclass(frozen=True)
class QualityResult:
    """One configuration. Divergences in nats, errors are standard errors of the mean."""

    name: str
    engine: str
    """what computes the experts, and its threads"""
    mean_kld: float
    mean_kld_error: float
    median_kld: float
    kld_90: float
    """90th percentile"""
    kld_99: float
    max_kld: float
    same_top: float
    """share of tokens"""
    same_top_error: float
    perplexity: float
    perplexity_ratio: float
    """over the reference's"""

    @classmethod
    def of(
        cls, name: str, engine: str, chunks: Sequence[TokenFigures], reference: Sequence[Sequence[float]]
    ) -> QualityResult:
        """
        Args:
            chunks: at least one, with at least one token.
            reference: its losses for the same tokens.

        >>> found = TokenFigures([2.0, 2.0, 2.0], [0.0, 0.1, 0.5], [True, True, False])
        >>> result = QualityResult.of("x", "torch", [found], [[1.0, 2.0, 3.0]])
        >>> round(result.mean_kld, 9), result.max_kld, round(result.same_top, 3), result.perplexity_ratio
        (0.2, 0.5, 0.667, 1.0)
        """
        loss, kld, same = (np.concatenate(parts).astype(np.float64) for parts in zip(*chunks, strict=True))
        ratio = np.exp(loss.mean() - np.concatenate(reference).mean())
        figures = [
            kld.mean(), _error(kld), *np.percentile(kld, [50, 90, 99]), kld.max(), same.mean(), _error(same), np.exp(loss.mean()), ratio,
        ]  # fmt: skip
        return cls(name, engine, *map(float, figures))


def _error(values: np.ndarray[Any, np.dtype[np.float64]]) -> float:
    return float(values.std() / len(values) ** 0.5)


@dataclass(frozen=True)
class QualityReport:
    """All configurations, on the same tokens."""

    text: str
    """the file's name"""
    tokens: int
    """of the text"""
    chunks: int
    context: int
    """tokens of a chunk"""
    predicted: int
    """tokens that count: those of the chunks' second halves but for each half's first"""
    reference: str
    """what computed the reference's experts"""
    perplexity: float
    """the reference's"""
    rows: list[QualityResult]

    def to_dict(self) -> dict[str, Any]:
        """All figures, for JSON."""
        return asdict(self)
