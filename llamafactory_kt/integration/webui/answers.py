"""Which answers run, one after the other, and which of them each page shows. Stop, Clear history and Unload end them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from threading import Lock
from typing import Any

from ...model.state import has_kt_experts
from ...router_stats.stats import counts_experts, get_router_stats
from ..generation import Generation
from .page_answer import Counts, Messages, PageAnswer, Shown

MOST = 100
"""pages and browsers whose last answer is kept"""


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
