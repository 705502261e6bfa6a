"""Answers that run in threads of their own, and which of them each page shows.

A page that is reloaded in mid-answer finds the answer again; Stop, Clear history and Unload end it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextvars import copy_context
from threading import Event, Lock, Thread
from typing import Any

from ...model.state import has_kt_experts
from ...router_stats.stats import LayerStats, counted_since, counts_experts, get_router_stats
from ..generation import Generation
from .texts import say

Messages = list[dict[str, Any]]
Shown = tuple[Messages, Messages]
"""a conversation as a page shows it, and as the model gets it"""
Counts = dict[int, LayerStats]
"""layer -> how often its experts were used; empty if nobody counts, or nothing was counted yet"""

INTERVAL = 0.1
"""seconds between two looks at an answer"""
MOST = 100
"""pages and browsers whose last answer is kept"""


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
        at = self.generation
        if at.tokens:
            return self.conversation
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


class Answers:
    """The answers of one model: those that run, and the last one of each page and browser."""

    def __init__(self, count: Callable[[], Counts]) -> None:
        """Args:
        count: what the model has counted so far; nothing if it does not count.
        """
        self._count = count
        self._asking = Lock()
        self._running: set[PageAnswer] = set()
        self._last: dict[str, PageAnswer] = {}
        self._browsers: dict[str, str] = {}

    def ask(self, page: str | None, stream: Callable[[Generation], Iterator[Shown]], conversation: Shown) -> PageAnswer:
        """Start an answer as soon as those that were asked for before are done. Ends those that no page shows any more."""
        generation, before = Generation(), self.last(page)
        with self._asking:
            for other in (ahead := self.running()):
                if other.abandoned:
                    other.stop()
            answer = PageAnswer(
                generation, lambda: stream(generation), conversation, ahead, self._count,
                counted=before.counted if before else None,
            )  # fmt: skip
            self._running.add(answer)
        for key in filter(None, (page, self._browsers.get(page or ""))):
            _put(self._last, key, answer)
        return answer

    def count_anew(self) -> None:
        """Forget what was counted in all conversations. The model's own counts are its owner's to reset."""
        for answer in {*self._last.values(), *self.running()}:
            answer.counted = {}

    def running(self) -> list[PageAnswer]:
        """Those that have not ended."""
        for answer in tuple(self._running):
            if not answer.running:
                self._running.discard(answer)
        return list(self._running)

    def last(self, page: str | None) -> PageAnswer | None:
        """What a page has shown last."""
        return self._last.get(page or "")

    def opened(self, page: str | None, browser: str) -> PageAnswer | None:
        """Note a new page, and give it what its browser has shown last."""
        _put(self._browsers, page or "", browser)
        if (answer := self._last.get(browser)) is not None:
            _put(self._last, page or "", answer)
        return answer

    def clear(self, page: str | None) -> None:
        """End and forget a page's conversation."""
        if (answer := self._last.pop(page or "", None)) is not None:
            answer.drop()
            for key in [key for key, other in tuple(self._last.items()) if other is answer]:
                del self._last[key]

    def end(self) -> None:
        """End all, and forget all."""
        for answer in (running := self.running()):
            answer.stop()
        for answer in running:
            answer.wait()
        self._last.clear()


def answers_of(chatter: Any) -> Answers:
    """The answers of LLaMA-Factory's chatter."""

    def count() -> Counts:
        model = getattr(chatter.engine, "model", None)
        return get_router_stats(model) if has_kt_experts(model) and counts_experts(model) else {}

    answers: Answers = vars(chatter).setdefault("_kt_answers", Answers(count))
    return answers


def _put(table: dict[str, Any], key: str, value: Any) -> None:
    """Make it the newest entry; the oldest go."""
    table.pop(key, None)
    table[key] = value
    while len(table) > MOST:
        table.pop(next(iter(table)), None)


def answered(messages: Messages) -> Messages:
    """Without questions that have no answer: one that was stopped before any text, or ended in an error.

    >>> user, assistant = ({"role": role} for role in ("user", "assistant"))
    >>> [m["content"] for m in answered([user | {"content": "a"}, user | {"content": "b"}])]
    ['b']
    >>> [m["content"] for m in answered([user | {"content": "a"}, assistant | {"content": ""}, user | {"content": "b"}])]
    ['b']
    """
    said = [message for message in messages if message["role"] != "assistant" or message["content"]]
    following = [*said[1:], {}]
    return [m for m, after in zip(said, following, strict=True) if (m["role"], after.get("role")) != ("user", "user")]


def up_to_question(messages: Messages, *asking: str) -> Messages:
    """A conversation up to its last question, that included; empty without one.

    Args:
        asking: the roles that ask.
    """
    places = [place for place, message in enumerate(messages) if message["role"] in asking]
    return messages[: places[-1] + 1] if places else []
