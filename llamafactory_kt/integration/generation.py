"""One answer while it is generated: it can be stopped from outside, ends at stop strings, and keeps its figures."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from contextvars import ContextVar
from typing import Any

import torch
from transformers import StoppingCriteria


class Generation(StoppingCriteria):  # type: ignore[misc]
    """A stopping criterion of transformers' ``generate``, which calls it after every token.

    Args:
        stop_strings: the answer ends where one of them begins.
    """

    def __init__(self, stop_strings: Sequence[str] = ()):
        self.stop_strings = tuple(text for text in stop_strings if text)
        self.prompt_tokens = 0
        self.tokens = 0
        """generated so far, the end-of-answer token included"""
        self.finish_reason = "length"
        """``stop`` where the model, a stop string or :meth:`stop` ended the answer"""
        self.interrupted = False
        """whether the person in front of it wanted no more"""
        self.error: BaseException | None = None
        """what ``generate`` raised in its thread"""
        self._stop = threading.Event()
        self._started = self._first = self._last = 0.0

    def begin(self, tokenizer: Any, prompt_tokens: int, eos: Sequence[int]) -> None:
        """Note what the prompt is; called right before ``generate``."""
        self.prompt_tokens, self._tokenizer, self._eos = prompt_tokens, tokenizer, frozenset(eos)
        self._started = time.perf_counter()

    def stop(self) -> None:
        """End the answer after the token that is being computed; from any thread, also before it has begun."""
        self._stop.set()

    @property
    def stopped(self) -> bool:
        """Whether :meth:`stop` was called."""
        return self._stop.is_set()

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        """Whether each row of input_ids [B, T] is finished, bool [B]."""
        self.count(self.tokens + 1)
        done = [self.stopped or self._at_stop_string(row) for row in input_ids]
        if done[0] or int(input_ids[0, -1]) in self._eos:
            self.finish_reason = "stop"
        return torch.tensor(done, device=input_ids.device)

    def count(self, tokens: int) -> None:
        """Note that the answer has so many tokens by now."""
        self._last = time.perf_counter()
        self._first = self._first or self._last
        self.tokens = tokens

    def _at_stop_string(self, row: torch.Tensor) -> bool:
        if not self.stop_strings:
            return False
        # A character is four tokens at most (the bytes of UTF-8); the newest token may hold more than the stop string.
        tail = 4 * max(map(len, self.stop_strings)) + 8
        text = self._tokenizer.decode(row[self.prompt_tokens :][-tail:], skip_special_tokens=True)
        return any(stop in text for stop in self.stop_strings)

    @property
    def seconds_to_first_token(self) -> float:
        """From the end of tokenising to the first token of the answer, 0 without one."""
        return max(0.0, self._first - self._started)

    @property
    def tokens_per_second(self) -> float:
        """Speed after the first token, 0 where there was one at most."""
        return (self.tokens - 1) / (self._last - self._first) if self.tokens > 1 else 0.0

    def __str__(self) -> str:
        return (
            f"prompt {self.prompt_tokens} tokens, first token after {self.seconds_to_first_token:.2f} s, "
            f"answer {self.tokens} tokens at {self.tokens_per_second:.1f} tokens/s"
        )


generation_of_request: ContextVar[Generation | None] = ContextVar("generation_of_request", default=None)
"""the generation of the request that is being answered, where somebody watches whether the answer is still wanted"""


class StopText:
    """Cuts a text that comes in pieces before the first stop string; holds back what may be the beginning of one."""

    def __init__(self, stop_strings: Sequence[str]):
        self._stop_strings = stop_strings
        self._held = ""
        self.found = False

    def feed(self, text: str) -> str:
        """The part of everything fed so far that is certain and was not returned yet.

        >>> cut = StopText(["END"])
        >>> cut.feed("one E"), cut.feed("xit E"), cut.feed("NDless"), cut.found, cut.feed("more")
        ('one ', 'Exit ', '', True, '')
        """
        if self.found:
            return ""
        self._held += text
        places = [place for stop in self._stop_strings if (place := self._held.find(stop)) >= 0]
        if places:
            self.found = True
            return self._held[: min(places)]
        keep = max((_overlap(self._held, stop) for stop in self._stop_strings), default=0)
        certain = self._held[: len(self._held) - keep]
        self._held = self._held[len(certain) :]
        return certain

    def end(self) -> str:
        """What was held back, once no more text comes.

        >>> cut = StopText(["END"]); cut.feed("the E"), cut.end()
        ('the ', 'E')
        """
        rest, self._held = "" if self.found else self._held, ""
        return rest


def _overlap(text: str, stop: str) -> int:
    """How many characters at the end of ``text`` begin ``stop``."""
    return next((size for size in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:size])), 0)
