"""``llamafactory.chat.chat_model``: the chat in the terminal, if the command line sets ``use_kt``.

Ctrl-C stops the answer and keeps the session, Ctrl-D leaves, and :mod:`.commands` does what begins with a slash. Without
``use_kt`` the chat is LLaMA-Factory's own.
"""

from __future__ import annotations

import contextlib
import signal
import sys
import time
from collections.abc import Iterator
from types import ModuleType
from typing import Any

from ...ground.errors import KTDataError, KTError
from ...ground.streams import keep_stdout_clean, take_any_text
from ...model.state import has_kt_experts, kt_state
from ..early_interrupt import imports_have_ended
from ..patching import asks_for, expect, replace
from .questions import edit_lines, read_question
from .short_log import keep_log_short


def patch(module: ModuleType) -> None:
    """Replace ``run_chat``, which the command line looks up when it is called."""
    stock = expect(module, "run_chat")

    def run_chat() -> None:
        imports_have_ended()
        if asks_for("use_kt"):
            take_any_text()
            edit_lines()
            debug = asks_for("kt_debug")  # shows the kernel's own output while it loads
            if not debug:
                keep_stdout_clean()
                keep_log_short()
            chat_model = module.ChatModel()
            if debug:
                keep_stdout_clean()
            _converse(chat_model)
        else:
            stock()

    replace(module, run_chat)


def _converse(chat_model: Any) -> None:
    from .commands import Conversation, counts_experts, run_command

    chat = Conversation(chat_model)
    chat.show_stats = (
        kt_state(chat.model).show_stats
        if has_kt_experts(chat.model)
        else getattr(chat_model.engine, "kt_show_stats", False)
    )
    experts = ", `/experts` which experts it used" if counts_experts(chat.model) else ""
    print(
        "Welcome to the CLI application, use `clear` to remove the history, use `exit` to exit the application.\n"
        f"Ctrl-C stops an answer, `/stats` shows its speed{experts}, `/help` lists the commands."
    )
    while not chat.ended:
        try:
            question = read_question("\nUser: ")
        except UnicodeDecodeError:
            print("Detected decoding error at the inputs, please set the terminal encoding to utf-8.")
            continue
        except KeyboardInterrupt:
            print("\nUse `exit` or Ctrl-D to leave.")
            continue
        except EOFError:
            print()
            return
        if not question and sys.stdin.isatty():
            continue
        if "\ufffd" in question:
            print(
                "The line has bytes that are no text in this terminal's encoding; \ufffd stands for them.",
                file=sys.stderr,
            )
        try:
            said = run_command(chat, question)
        except KTError as error:
            said = str(error)
        except KeyboardInterrupt:  # of a command; what it had begun is done, or undone
            said = "Interrupted."
        if said is not None:
            print(said, end="\n" if said else "")
            continue
        try:
            _answer(chat, question)
        except KTDataError as error:  # the question cannot be answered; the next one can
            print(error)


def _answer(chat: Any, query: str) -> None:
    """Print the answer as it comes. The history gets question and answer, or neither if it was interrupted before any text."""
    from ..generation import Generation

    generation, response = Generation(), ""
    question = {"role": "user", "content": query}
    print("Assistant: ", end="", flush=True)
    progress = _Progress(generation) if sys.stdout.isatty() else None
    with _stopped_by_interrupt(generation):
        texts = chat.chat_model.stream_chat([*chat.messages, question], kt_generation=generation, **chat.generating)
        for text in texts:
            if progress is not None:
                progress.end()
            print(text, end="", flush=True)
            response += text
            if generation.interrupted:
                break
    interrupted = generation.interrupted
    if progress is not None:
        progress.end()
    print(" [stopped]" if interrupted else "")
    if response or not interrupted:
        chat.messages += [question, {"role": "assistant", "content": response}]
    if chat.show_stats:
        print(f"[{generation}]")


class _Progress:
    """How much of a prompt has been read, on the line of its answer. Short prompts show nothing."""

    def __init__(self, generation: Any):
        self._shown, self._ended, self._last = "", False, time.monotonic()
        generation.watch = self._show

    def _show(self, generation: Any) -> None:
        now = time.monotonic()
        if now - self._last >= _SECONDS and not self._ended:
            text = f"reading the prompt {generation.read_tokens} of {generation.prompt_tokens}"
            self._write(text)
            self._last = now

    def _write(self, text: str) -> None:
        back = "\b" * len(self._shown)
        print(back + text.ljust(len(self._shown)) + "\b" * max(0, len(self._shown) - len(text)), end="", flush=True)
        self._shown = text

    def end(self) -> None:
        """Take it away."""
        if not self._ended:
            self._ended = True
            self._write("")


_SECONDS = 0.5
"""between two notes about a prompt that is being read"""


@contextlib.contextmanager
def _stopped_by_interrupt(generation: Any) -> Iterator[None]:
    """Ctrl-C ends the answer after its current token; a second Ctrl-C before that ends the program."""

    def stop(number: int, frame: Any) -> None:
        if generation.interrupted:
            raise KeyboardInterrupt
        generation.interrupted = True
        generation.stop()

    before = signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
