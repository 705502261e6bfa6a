"""An answer of a page, in a thread of its own: a page that is reloaded in mid-answer finds it again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextvars import copy_context
from threading import Event, Thread
from typing import Any

from ...router_stats.stats import LayerStats, counted_since
from ..generation import Generation
from .texts import say

Messages = list[dict[str, Any]]
Shown = tuple[Messages, Messages]
"""a conversation as a page shows it, and as the model gets it"""
Counts = dict[int, LayerStats]
"""layer -> how often its experts were used; empty if nobody counts, or nothing was counted yet"""

INTERVAL = 0.1
"""seconds between two looks at an answer"""


class PageAnswer:
    """An answer that is being generated. Continues if the page that asked for it is closed.

    Args:
        generation: what ``stream`` generates with.
        stream: starts generating; its pieces are the conversation with more and more of the answer.
        conversation: with the question, without the answer.
        ahead: the answers that come first, one after the other.
        count: what the model has counted so far.
        counted: in this conversation, before this answer.
    """

    def __init__(
        self, generation: Generation, stream: Callable[[], Iterator[Shown]], conversation: Shown,
        ahead: Sequence[PageAnswer] = (), count: Callable[[], Counts] = dict, counted: Counts | None = None,
    ):  # fmt: skip
        self.generation = generation
        self.conversation = conversation
        self.asked = [*conversation[1]]
        """what the model was given"""
        self.taken_back = False
        """whether the question was taken back, to be edited"""
        self.counted = counted or {}
        self.stopped = False
        self._ahead, self._count = [*ahead], count
        self._dropped = False
        self._error: Exception | None = None
        self._followers: set[object] = set()
        self._followed = False
        self._turn, self._done = Event(), Event()
        Thread(target=copy_context().run, args=(self._run, stream), name="answer", daemon=True).start()

    def _run(self, stream: Callable[[], Iterator[Shown]]) -> None:
        try:
            for other in self._ahead:
                while not other._done.wait(INTERVAL) and not self.stopped:
                    pass
            self._ahead = []
            self._turn.set()
            if not self.stopped:
                self._answer(stream)
        except Exception as error:
            self._error = error
        finally:
            self._turn.set()
            self._done.set()

    def _answer(self, stream: Callable[[], Iterator[Shown]]) -> None:
        before = self._count()
        try:
            for chatbot, messages in stream():
                self.conversation = [*chatbot], messages
        finally:
            new = counted_since(before, self._count())
            self.counted = {layer: self.counted[layer] + e if layer in self.counted else e for layer, e in new.items()}

    @property
    def running(self) -> bool:
        return not self._done.is_set()

    @property
    def ahead(self) -> int:
        """How many answers come first."""
        return sum(other.running for other in self._ahead)

    @property
    def abandoned(self) -> bool:
        """Whether all pages that have shown it are gone."""
        return self._followed and not self._followers

    def stop(self) -> None:
        """End it after the current token."""
        if self.running:
            self.stopped = True
            self.generation.stop()

    def take_back(self, kept: Shown) -> None:
        """The page has only this part of the conversation now, and the question is being edited."""
        self.conversation, self.taken_back = kept, True

    def drop(self) -> None:
        """End it, and empty the pages that show it."""
        self.stop()
        self._dropped = True

    def wait_for_turn(self) -> None:
        """Return when no other comes first any more."""
        self._turn.wait()

    def wait(self) -> None:
        """Return when it has ended."""
        self._done.wait()

    def follow(self, language: str | None) -> Iterator[Shown]:
        """The conversation whenever it changes, at last with the answer's figures below it.

        Raises:
            Exception: What ended the answer.
        """
        follower, shown = object(), None
        self._followers.add(follower)
        self._followed = True
        try:
            while not self._done.wait(INTERVAL) and not self._dropped:
                if (now := self._now(language)) != shown:
                    yield now
                shown = now
        finally:
            self._followers.discard(follower)
        yield ([], []) if self._dropped else self._with(self._figures(language))
        if self._error is not None:
            raise self._error

    def _now(self, language: str | None) -> Shown:
        at, last = self.generation, self.conversation[0][-1:]
        if at.tokens and any(message["role"] != "user" and message["content"] for message in last):
            return self.conversation  # before, the tokens may be half a character
        if not at.prompt_tokens:
            ahead = self.ahead
            return self._with(say("in_line", language, ahead=ahead) if ahead else say("begun", language))
        return self._with(say("reading", language, read=at.read_tokens, prompt=at.prompt_tokens))

    def _with(self, note: str) -> Shown:
        """With a message of its own below: an answer may end inside a code block."""
        chatbot, messages = self.conversation
        said = [message for message in chatbot if message["role"] == "user" or message["content"]]
        return ([*said, {"role": "assistant", "content": f"<small>{note}</small>"}] if note else said), messages

    def _figures(self, language: str | None) -> str:
        at = self.generation
        if not at.tokens:
            return say("not_answered" if self._error else "stopped_early", language)
        kept = say("kept", language, cached=at.cached_tokens) if at.cached_tokens else ""
        figures = say(
            "figures", language, speed=at.tokens_per_second, prompt=at.prompt_tokens, kept=kept,
            first=at.seconds_to_first_token, answer=at.tokens,
        )  # fmt: skip
        if self.stopped:
            return figures + say("stopped", language)
        return figures + (say("cut", language) if at.finish_reason == "length" else "")
