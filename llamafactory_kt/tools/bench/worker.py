"""What runs in a bench's worker processes: a configuration that measures on request."""

from __future__ import annotations

import contextlib
import os
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

from ...ground.errors import one_line
from ...ground.internals import cache_of
from ..process_memory import (
    peak_gpu_memory,
    peak_resident_memory,
    proportional_memory,
    reset_peak_resident_memory,
    resident_memory,
)
from .configs import BenchConfig
from .results import ForwardParts, LoadStats, PartsResult
from .speed import settle, wall_and_cpu

Prepare = Callable[[int], None]
"""called with the number of tokens of the next forward"""


def serve_config(pipe: Connection, config: BenchConfig, prompt_tokens: Sequence[int], seed: int) -> None:
    """Load a configuration and measure it on request.

    Sends :class:`LoadStats`, or a string with the reason why loading failed. Then answers ``(prompt length, new tokens, whether to
    time the parts)``: after the prompt with True, and, when it is told to go on, with (prefill seconds, median seconds per token,
    cores kept busy while waiting, the :class:`SecondTurn`), or with a :class:`PartsResult`. Answers ``("end",)`` with (peak resident memory, peak GPU memory,
    resident memory, proportional memory).
    """
    os.dup2(2, 1)  # LLaMA-Factory and kt-kernel write to stdout, which is for the report
    os.environ.setdefault("LLAMAFACTORY_VERBOSITY", "WARN")
    from .turns import second_turn

    try:
        model, stats, prepare = _load(config, prompt_tokens, seed)
        for length in prompt_tokens:
            _warm_up(model, stats, length, seed, prepare)
        reset_peak_resident_memory()
    except Exception as error:
        pipe.send(one_line(error))
        return

    def pause() -> None:
        """Let the parent measure the machine's speed."""
        settle()
        pipe.send(True)
        pipe.recv()

    waiting = settle()
    pipe.send(stats)
    with contextlib.suppress(EOFError):  # the parent is gone
        while (request := pipe.recv()) != ("end",):
            busy, (length, new_tokens, parts) = _busy_cores(waiting), request
            answer: object
            if parts:
                answer = _time_parts(model, length, seed, new_tokens, prepare, pause)
            else:
                found = _generate(
                    model, length, seed, new_tokens, prepare, lambda number: pause() if number == 1 else None
                )
                answer = found.prompt, statistics.median(found.tokens), busy, second_turn(model, found.ids, found.cache)
            waiting = settle()
            pipe.send(answer)
        pipe.send((peak_resident_memory(), peak_gpu_memory(), resident_memory(), proportional_memory()))


def check_configs(pipe: Connection, configs: Sequence[BenchConfig]) -> None:
    """Send the (name, reason) of each configuration whose keys are refused; nothing is loaded."""
    os.dup2(2, 1)
    from ...integration import bootstrap

    bootstrap.activate()
    from ...integration.chat_config import parse

    refused = []
    for config in configs:
        try:
            parse(config.config)
        except Exception as error:
            refused.append((config.name, one_line(error)))
    pipe.send(refused)


def _load(config: BenchConfig, prompt_tokens: Sequence[int], seed: int) -> tuple[Any, LoadStats, Prepare]:
    import torch

    from ...integration.chat import LoadedChat, import_chat
    from ...integration.chat_config import open_configured, parse
    from ...integration.model.loader import for_text_alone
    from ...model.state import has_kt_experts, kt_state
    from .memory import ModelBytes
    from .stock import FastestExperts, merge_into

    import_chat()
    args = parse(config.config) if config.stock else None
    adapters = open_configured(args) if config.stock else None
    before, started = resident_memory(), time.perf_counter()
    with for_text_alone() if config.stock else contextlib.nullcontext():  # the prompts are
        model = LoadedChat.load(config.loaded_config).model
    load = time.perf_counter() - started
    prepare: Prepare = lambda tokens: None  # noqa: E731
    _generate(model, min(prompt_tokens), seed, 2, prepare)  # weights that are only mapped become resident
    resident = resident_memory()
    peak = max(resident, peak_resident_memory())  # the system updates its peak late
    push, threads = None, f"torch {torch.get_num_threads()}"
    if args is not None and adapters is not None:
        model = merge_into(model, adapters, args.kt_lora_scope)
        prepare = fastest = FastestExperts(model, prompt_tokens)
        engine = f"transformers, {fastest}: {threads}"
    elif has_kt_experts(model):
        push = _reload_lora(model)
        engine = str(kt_state(model).plan)
    else:
        engine = f"transformers: {threads}"
    layers = model.config.get_text_config().num_hidden_layers
    return (
        model,
        LoadStats(engine, load, before, resident, peak, *ModelBytes.of(model), push=push, layers=layers),
        prepare,
    )


def _warm_up(model: Any, stats: LoadStats, length: int, seed: int, prepare: Prepare) -> None:
    """Generate after a prompt, and count what it takes."""
    from .memory import cache_bytes
    from .parts import operations_of

    with ExitStack() as counting:
        counted = counting.enter_context(operations_of(model))
        # after some tokens: layers learn from the first ones what they compute
        found = _generate(model, length, seed, 4, prepare, lambda number: counting.close() if number else None)
    stats.operations[length], stats.cache[length] = dict(counted), cache_bytes(found.cache)


def _time_parts(
    model: Any, length: int, seed: int, new_tokens: int, prepare: Prepare, pause: Callable[[], None]
) -> PartsResult:
    """Time the parts of a prompt and of every other token; the tokens between them show what the timing costs."""
    from .parts import PartTimes, parts_of

    timed: dict[int, PartTimes] = {}
    timing = ExitStack()

    def before(number: int) -> None:
        timing.close()
        if number == 1:
            pause()
        if number == 0 or number % 2:
            timed[number] = timing.enter_context(parts_of(model))

    with timing:
        found = _generate(model, length, seed, max(new_tokens, 2), prepare, before)
    forwards = [found.prompt, *found.tokens]
    parts = [(forwards[number], times.seconds) for number, times in timed.items() if number < len(forwards)]
    plain = statistics.median(found.tokens[1::2])
    return PartsResult(ForwardParts.of(parts[:1]), ForwardParts.of(parts[1:]), plain)


def _reload_lora(model: Any) -> float | None:
    """Load the model's expert LoRA once more; seconds per layer, None without LoRA or with a merged adapter."""
    from ...apply import load_moe_lora_from_adapter
    from ...model.state import kt_state

    state = kt_state(model)
    adapters = state.expert_adapters
    if not adapters.layers or state.merged is not None:
        return None
    started = time.perf_counter()
    load_moe_lora_from_adapter(model, adapters)
    return (time.perf_counter() - started) / len(adapters.layers)


class _Generated(NamedTuple):
    """Times in seconds."""

    prompt: float
    tokens: list[float]
    """of each token after the first"""
    cache: Any
    """transformers' cache of keys and values"""
    ids: Any
    """int64 [1, T] of the prompt and the answer"""


def _generate(
    model: Any,
    length: int,
    seed: int,
    new_tokens: int,
    prepare: Prepare,
    before: Callable[[int], object] = lambda number: None,
) -> _Generated:
    """Generate greedily from a random prompt as LLaMA-Factory's chats do: ``generate`` in its own thread.

    Args:
        before: called, off the clock, before each forward with its number, 0 for the prompt; and once more after the last.
    """
    import torch

    vocabulary = model.config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(length + (seed << 32))
    ids = torch.randint(10, vocabulary, (1, length), generator=generator).to(model.device)

    def ready(number: int) -> None:
        before(number)
        if number < 2:
            prepare(1 if number else length)

    clock = _Clock(ready)
    with ThreadPoolExecutor(1) as thread:
        answer = thread.submit(
            model.generate, input_ids=ids, attention_mask=torch.ones_like(ids), streamer=clock, do_sample=False,
            max_new_tokens=new_tokens + 1, eos_token_id=vocabulary, pad_token_id=0,  # no token has this id: none ends it
            return_dict_in_generate=True,
        )  # fmt: skip
        found = answer.result()
    prompt, *tokens = clock.seconds
    return _Generated(prompt, tokens, cache_of(found), found.sequences)


class _Clock:
    """Streamer that records the seconds between the prompt's going in and each token's coming out."""

    def __init__(self, before: Callable[[int], None]):
        self.seconds: list[float] = []
        self._before = before
        self._started: float | None = None

    def put(self, _: Any) -> None:
        if self._started is not None:
            self.seconds.append(time.perf_counter() - self._started)
        self._before(len(self.seconds))
        self._started = time.perf_counter()

    def end(self) -> None:
        """``generate`` calls this at the end."""


def _busy_cores(since: tuple[float, float]) -> float | None:
    """The cores that this process has kept busy; None if too little time has passed to tell."""
    passed, used = (now - then for now, then in zip(wall_and_cpu(), since, strict=True))
    return used / passed if passed > 0.05 else None
