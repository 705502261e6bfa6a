"""``llamafactory.chat.chat_model``: the chat in the terminal, if the command line sets ``use_kt``.

Ctrl-C stops the answer and keeps the session, ``/stats`` shows figures after each answer, ``/experts`` shows the router
statistics, and Ctrl-D leaves. Without ``use_kt`` the chat is LLaMA-Factory's own.
"""

from __future__ import annotations

import contextlib
import signal
import sys
import time
from collections.abc import Iterator
from types import ModuleType
from typing import Any

from ..ground.errors import KTDataError, KTModelError
from ..ground.streams import keep_stdout_clean, take_any_text
from ..model.state import has_kt_experts, kt_state
from .patching import asks_for, expect, replace


def patch(module: ModuleType) -> None:
    """Replace ``run_chat``, which the command line looks up when it is called."""
    stock = expect(module, "run_chat")

    def run_chat() -> None:
        if asks_for("use_kt"):
            take_any_text()
            with contextlib.suppress(ImportError):
                import readline  # history and editing for input()

                for setting in ("input-meta on", "output-meta on", "convert-meta off"):  # bytes above 127 are text
                    readline.parse_and_bind(f"set {setting}")
            debug = asks_for("kt_debug")  # shows the kernel's own output while it loads
            if not debug:
                keep_stdout_clean()
            chat_model = module.ChatModel()
            if debug:
                keep_stdout_clean()
            _converse(chat_model)
        else:
            stock()

    replace(module, run_chat)


def _converse(chat_model: Any) -> None:
    from llamafactory.extras.misc import torch_gc

    messages: list[dict[str, str]] = []
    model = getattr(chat_model.engine, "model", None)  # with infer_backend: sglang, the server has it
    show_stats = (
        kt_state(model).show_stats if has_kt_experts(model) else getattr(chat_model.engine, "kt_show_stats", False)
    )
    print(
        "Welcome to the CLI application, use `clear` to remove the history, use `exit` to exit the application.\n"
        "Ctrl-C stops an answer, `/stats` shows its speed, `/experts` which experts it used."
    )
    while True:
        try:
            query = input("\nUser: ")
        except UnicodeDecodeError:
            print("Detected decoding error at the inputs, please set the terminal encoding to utf-8.")
            continue
        except KeyboardInterrupt:
            print("\nUse `exit` or Ctrl-D to leave.")
            continue
        except EOFError:
            print()
            return
        if "\ufffd" in query:
            print(
                "The line has bytes that are no text in this terminal's encoding; \ufffd stands for them.",
                file=sys.stderr,
            )
        command = query.strip()
        if command == "exit":
            return
        if command == "clear":
            messages.clear()
            torch_gc()
            print("History has been removed.")
        elif command == "/stats":
            show_stats = not show_stats
            print(f"Figures after each answer: {'on' if show_stats else 'off'}.")
        elif command == "/experts":
            print(_experts(model))
        else:
            try:
                _answer(chat_model, messages, query, show_stats)
            except KTDataError as error:  # the question cannot be answered; the next one can
                print(error)


def _experts(model: Any) -> str:
    """The table of router statistics, or why there is none."""
    from ..router_stats.stats import get_router_stats, router_table

    if model is None:
        return "The experts are in the server; router statistics need infer_backend: huggingface."
    try:
        return router_table(get_router_stats(model))
    except KTModelError as error:
        return str(error)


def _answer(chat_model: Any, messages: list[dict[str, str]], query: str, show_stats: bool) -> None:
    """Print the answer as it comes. The history gets question and answer, or neither if it was interrupted before any text."""
    from .generation import Generation

    generation, response = Generation(), ""
    question = {"role": "user", "content": query}
    print("Assistant: ", end="", flush=True)
    progress = _Progress(generation) if sys.stdout.isatty() else None
    with _stopped_by_interrupt(generation):
        for text in chat_model.stream_chat([*messages, question], kt_generation=generation):
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
        messages += [question, {"role": "assistant", "content": response}]
    if show_stats:
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
