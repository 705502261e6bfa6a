"""One answer while it is generated: other threads can stop it, it ends at stop strings, and it measures itself."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from typing import Any

import torch
from transformers import StoppingCriteria

from ..decoding.choosing import Chooser, Chosen, Wishes


class Generation(StoppingCriteria):  # type: ignore[misc]
    """A stopping criterion for transformers' ``generate``, which calls it after every token."""

    def __init__(self, whole: Generation | None = None) -> None:
        """Args:
        whole: what this answer is one of; it stops with that.
        """
        self.stop_strings: tuple[str, ...] = ()
        """the answer is cut before the first of them"""
        self.prompt_tokens = 0
        self.cached_tokens = 0
        """of the prompt, those whose keys and values were kept from earlier"""
        self.read_tokens = 0
        """of the prompt, those that have been read, the kept ones among them"""
        self.tokens = 0
        """generated so far, including the end-of-sequence token"""
        self.watch: Callable[[Generation], None] | None = None
        """called in the thread that generates, while it reads the prompt"""
        self.finish_reason = "length"
        """``stop`` if the model, a stop string or :meth:`stop` ended the answer"""
        self.interrupted = False
        """whether the user pressed Ctrl-C"""
        self.error: BaseException | None = None
        """raised by ``generate`` in its thread"""
        self.wishes = Wishes()
        """of the request, about the choice of tokens"""
        self.number = 0
        """of the first answer in its request"""
        self.chosen: list[list[Chosen]] = []
        """the tokens of each answer so far, without the one that ends it, if there are wishes"""
        self._stop, self._whole = threading.Event(), whole
        self._started = self._first = self._last = 0.0

    def begin(self, tokenizer: Any, prompt_tokens: int, eos: Sequence[int]) -> None:
        """Start the clock; called right before ``generate``."""
        self.prompt_tokens, self._tokenizer, self._eos = prompt_tokens, tokenizer, frozenset(eos)
        self._started = time.perf_counter()

    def chooser(self) -> Chooser | None:
        """Chooses the tokens of the next call of ``generate``; None if there are no wishes. Called after :meth:`begin`."""
        return Chooser(self.wishes, self._eos, self.chosen, self.number + len(self.chosen)) if self.wishes else None

    def read(self, tokens: int) -> bool:
        """Note that so many tokens of the prompt have been read; whether to go on."""
        self.read_tokens = tokens
        if self.watch is not None:
            self.watch(self)
        if self.stopped:
            self.finish_reason = "stop"
        return not self.stopped

    def stop(self) -> None:
        """End the answer after the current token. Any thread may call it, even before the answer has begun."""
        self._stop.set()

    @property
    def stopped(self) -> bool:
        """Whether :meth:`stop` was called."""
        return self._stop.is_set() or (self._whole is not None and self._whole.stopped)

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        """bool [B]: whether each row of input_ids [B, T] is finished."""
        self.count(self.tokens + 1)
        done = [self.stopped or self._at_stop_string(row) for row in input_ids]
        if done[0] or int(input_ids[0, -1]) in self._eos:
            self.finish_reason = "stop"
        return torch.tensor(done, device=input_ids.device)

    def count(self, tokens: int) -> None:
        """Set the number of tokens generated so far, and note the time."""
        self._last = time.perf_counter()
        self._first = self._first or self._last
        self.tokens, self.read_tokens = tokens, self.prompt_tokens

    def _at_stop_string(self, row: torch.Tensor) -> bool:
        if not self.stop_strings:
            return False
        # A character is at most four tokens (its bytes in UTF-8); the last token may go on after the stop string.
        tail = 4 * max(map(len, self.stop_strings)) + 8
        text = self._tokenizer.decode(row[self.prompt_tokens :][-tail:], skip_special_tokens=True)
        return any(stop in text for stop in self.stop_strings)

    @property
    def begun(self) -> bool:
        """Whether its prompt is being read, or has been."""
        return self._started > 0 or self.tokens > 0

    @property
    def first_token_at(self) -> float:
        """Of ``time.perf_counter``; 0 without a token."""
        return self._first

    @property
    def seconds_to_first_token(self) -> float:
        """From the call of ``generate`` to the first token; 0 without a token."""
        return max(0.0, self._first - self._started)

    @property
    def tokens_per_second(self) -> float:
        """Speed after the first token; 0 with fewer than two tokens."""
        return (self.tokens - 1) / (self._last - self._first) if self.tokens > 1 else 0.0

    def __str__(self) -> str:
        kept = f" ({self.cached_tokens} kept from earlier)" if self.cached_tokens else ""
        return (
            f"prompt {self.prompt_tokens} tokens{kept}, first token after {self.seconds_to_first_token:.2f} s, "
            f"answer {self.tokens} tokens at {self.tokens_per_second:.1f} tokens/s"
        )


generation_of_request: ContextVar[Generation | None] = ContextVar("generation_of_request", default=None)
"""the generation of the current API request, which is stopped once nobody wants the answer"""


class StopText:
    """Cuts a streamed text before the first stop string; holds text back that may be the start of one."""

    def __init__(self, stop_strings: Sequence[str]):
        self._stop_strings = stop_strings
        self._held = ""
        self.found = False

    def feed(self, text: str) -> str:
        """The text that is certain to come before any stop string and has not been returned yet.

        >>> cut = StopText(["END"])
        >>> cut.feed("one E"), cut.feed("xit E"), cut.feed("NDless"), cut.found, cut.feed("more")
        ('one ', 'Exit ', '', True, '')
        """
        if self.found:
            return ""
        self._held += text
        if places := [place for stop in self._stop_strings if (place := self._held.find(stop)) >= 0]:
            self.found = True
            return self._held[: min(places)]
        end = len(self._held) - max((_overlap(self._held, stop) for stop in self._stop_strings), default=0)
        certain, self._held = self._held[:end], self._held[end:]
        return certain

    def end(self) -> str:
        """The text that was held back, when the stream has ended.

        >>> cut = StopText(["END"]); cut.feed("the E"), cut.end()
        ('the ', 'E')
        """
        rest, self._held = "" if self.found else self._held, ""
        return rest


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of ``text`` with which ``stop`` begins."""
    return next((size for size in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:size])), 0)
