"""Which token comes next, where a request has wishes of its own: a seed, a bias, penalties, a grammar, the tokens' probabilities.

transformers draws from PyTorch's global generator, which concurrent generations share. Here each answer has a generator of its own, so the
token is chosen by the last of the logits processors, after transformers' own (temperature, ``top_k``, ``top_p``); it leaves no other one
to choose. The first of them sees the model's own logits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from transformers import LogitsProcessor, LogitsProcessorList


class Matcher(Protocol):
    """How far one answer has come in a grammar."""

    def allowed(self) -> np.ndarray:
        """bool [V]: the tokens that may come next; the end of the answer is one of them."""

    def accept(self, token: int) -> None:
        """Go on by a token."""


@dataclass(frozen=True)
class Wishes:
    """What a request asks of the choice of its tokens, in the words of OpenAI's API."""

    seed: int | None = None
    """of the answers; answer ``i`` of a request draws from a stream of its own"""
    presence_penalty: float = 0.0
    """subtracted from the logits of tokens that the answer already has"""
    frequency_penalty: float = 0.0
    """the same, for each time that it has them"""
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    """token -> what is added to its logit"""
    logprobs: int | None = None
    """the number of likeliest tokens that are noted beside each chosen one; None: nobody reads what is noted"""
    matcher: Callable[[], Matcher] | None = None
    """makes one for each answer, at the beginning of a grammar"""

    def __bool__(self) -> bool:
        """Whether there is any; without, transformers chooses as always."""
        return self != Wishes()


class Chosen(NamedTuple):
    """A token of an answer, with natural logarithms of probabilities: of the model's own distribution, before everything that was wished,
    temperature included."""

    token: int
    logprob: float
    likeliest: tuple[tuple[int, float], ...]
    """tokens and their logarithms, likeliest first"""


class Chooser:
    """Chooses the tokens of one call of ``generate``.

    Args:
        wishes: of the request.
        ends: the tokens that end an answer; they are not noted.
        noted: gets a list for each answer, to which its tokens are appended while they are chosen.
        number: of the call's first answer in its request.
    """

    def __init__(self, wishes: Wishes, ends: frozenset[int], noted: list[list[Chosen]], number: int = 0):
        self._wishes, self._ends, self._number, self._noted = wishes, ends, number, noted
        self._rows, self._prompt, self._sampled = list[_Row](), 0, False
        self._logprobs: torch.Tensor | None = None
        self._biased = torch.tensor(list(wishes.logit_bias), dtype=torch.long)
        self._biases = torch.tensor(list(wishes.logit_bias.values()), dtype=torch.float32)

    def around(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """The arguments of transformers' ``_sample``, with our logits processors before and behind its own."""
        self._sampled = bool(arguments["generation_config"].do_sample)
        processors = [_Step(self._wish), *arguments["logits_processor"], _Step(self._choose)]
        return arguments | {"logits_processor": LogitsProcessorList(processors)}

    def _wish(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """The logits [B, V] float32 of the next token after ids [B, T], with what was wished."""
        wishes = self._wishes
        if not self._rows:
            self._prompt = ids.shape[1]
            self._rows = [_Row(wishes, self._number + row) for row in range(len(ids))]
            self._noted += [row.noted for row in self._rows]
        self._logprobs = scores.log_softmax(-1)
        scores = scores.clone()
        if wishes.presence_penalty or wishes.frequency_penalty:
            said = ids[:, self._prompt :]
            counts = torch.zeros_like(scores).scatter_add_(1, said, torch.ones_like(said, dtype=scores.dtype))
            scores -= wishes.frequency_penalty * counts + wishes.presence_penalty * (counts > 0)
        scores[:, self._biased.to(scores.device)] += self._biases.to(scores.device)
        for row, score in zip(self._rows, scores, strict=True):
            if row.matcher is not None and row.ended is None:
                allowed = torch.from_numpy(row.matcher.allowed()).to(score.device)
                score.masked_fill_(~allowed, -torch.inf)
        return scores

    def _choose(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """0 for the chosen token of each row, -inf for the others."""
        chosen = [
            self._next(number, row, scores[number]) if row.ended is None else row.ended
            for number, row in enumerate(self._rows)
        ]
        tokens = torch.tensor(chosen, device=scores.device)[:, None]
        return torch.full_like(scores, -torch.inf).scatter_(1, tokens, 0.0)

    def _next(self, number: int, row: _Row, score: torch.Tensor) -> int:
        if self._sampled:
            token = int(torch.multinomial(score.softmax(-1).cpu(), 1, generator=row.generator))
        else:
            token = int(score.argmax())
        if row.matcher is not None:
            row.matcher.accept(token)
        if token in self._ends:
            row.ended = token
        else:
            assert self._logprobs is not None
            logprobs = self._logprobs[number]
            values, tokens = logprobs.topk(min(self._wishes.logprobs or 0, len(logprobs)))
            likeliest = tuple(zip(tokens.tolist(), values.tolist(), strict=True))
            row.noted.append(Chosen(token, float(logprobs[token]), likeliest))
        return token


class _Step(LogitsProcessor):  # type: ignore[misc]
    def __init__(self, function: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]):
        self._function = function

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return self._function(input_ids, scores)


class _Row:
    """One answer of a call."""

    def __init__(self, wishes: Wishes, number: int):
        self.noted: list[Chosen] = []
        self.ended: int | None = None
        """the token that ended it"""
        self.matcher = wishes.matcher and wishes.matcher()
        self.generator = torch.Generator()
        if wishes.seed is None:
            self.generator.seed()
        else:  # mixed, so that neighboring seeds share no answers
            state = np.random.SeedSequence([wishes.seed % 2**64, number]).generate_state(1, np.uint64)
            self.generator.manual_seed(int(state[0]) % 2**63)
