"""What runs in a bench's worker processes: a configuration that measures on request, and the memory bandwidth."""

from __future__ import annotations

import contextlib
import os
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from multiprocessing.connection import Connection
from typing import Any

from ...ground.errors import one_line
from ..process_memory import peak_gpu_memory, peak_resident_memory, reset_peak_resident_memory, resident_memory
from .configs import BenchConfig
from .results import BANDWIDTH_BUFFER, LoadStats

SETTLE_TIMEOUT = 2.0
"""seconds"""

Prepare = Callable[[int], None]
"""called with the number of tokens of the next forward"""


def serve_config(pipe: Connection, config: BenchConfig, prompt_tokens: Sequence[int]) -> None:
    """Load a configuration and measure it on request.

    Sends :class:`LoadStats`, or a string with the reason why loading failed. Then answers ``(prompt length, new tokens)``
    with (prefill seconds, median seconds per token, cores kept busy while waiting), and ``("end",)`` with (peak resident
    memory, peak GPU memory).
    """
    os.dup2(2, 1)  # LLaMA-Factory and kt-kernel write to stdout, which is for the report
    os.environ.setdefault("LLAMAFACTORY_VERBOSITY", "WARN")
    try:
        model, stats, prepare = _load(config, prompt_tokens)
        for length in prompt_tokens:
            _generate(model, length, 2, prepare)  # warm-up
        reset_peak_resident_memory()
    except Exception as error:
        pipe.send(one_line(error))
        return
    waiting = _settle()
    pipe.send(stats)
    with contextlib.suppress(EOFError):  # the parent is gone
        while (request := pipe.recv()) != ("end",):
            busy, (length, new_tokens) = _busy_cores(waiting), request
            prefill, decode = _generate(model, length, new_tokens, prepare)
            waiting = _settle()
            pipe.send((prefill, decode, busy))
        pipe.send((peak_resident_memory(), peak_gpu_memory()))


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


def serve_bandwidth(pipe: Connection, threads: int) -> None:
    """Send True when ready, then answer each request with the memory bandwidth in bytes per second."""
    import torch

    torch.set_num_threads(threads)
    # The threads that read the buffer fill it, so its pages lie on their NUMA nodes.
    buffer = torch.ones(BANDWIDTH_BUFFER // 4)
    pipe.send(True)
    with contextlib.suppress(EOFError):  # the parent is gone
        while True:
            pipe.recv()
            times = []
            for _ in range(6):
                started = time.perf_counter()
                buffer.sum()
                times.append(time.perf_counter() - started)
            _settle()
            pipe.send(BANDWIDTH_BUFFER / statistics.median(times[1:]))


def _load(config: BenchConfig, prompt_tokens: Sequence[int]) -> tuple[Any, LoadStats, Prepare]:
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
    _generate(model, min(prompt_tokens), 2, prepare)  # weights that are only mapped become resident
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
    return model, LoadStats(engine, load, before, resident, peak, *ModelBytes.of(model), push=push), prepare


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


def _generate(model: Any, length: int, new_tokens: int, prepare: Prepare) -> tuple[float, float]:
    """Generate greedily from a random prompt as LLaMA-Factory's chats do: ``generate`` in its own thread.

    Returns:
        (prefill seconds, median seconds per token after it).
    """
    import torch

    vocabulary = model.config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(length)
    ids = torch.randint(10, vocabulary, (1, length), generator=generator).to(model.device)
    clock = _Clock(prepare)
    prepare(length)
    with ThreadPoolExecutor(1) as thread:
        answer = thread.submit(
            model.generate, input_ids=ids, attention_mask=torch.ones_like(ids), streamer=clock, do_sample=False,
            max_new_tokens=new_tokens + 1, eos_token_id=vocabulary, pad_token_id=0,  # no token has this id: none ends it
        )  # fmt: skip
        answer.result()
    prefill, *tokens = (after - before for before, after in pairwise(clock.times))
    return prefill, statistics.median(tokens)


class _Clock:
    """Streamer that records when the prompt goes in and when each token comes out."""

    def __init__(self, prepare: Prepare):
        self.times: list[float] = []
        self._prepare = prepare

    def put(self, _: Any) -> None:
        self.times.append(time.perf_counter())
        if len(self.times) == 2:
            self._prepare(1)

    def end(self) -> None:
        """``generate`` calls this at the end."""


def _times() -> tuple[float, float]:
    """(seconds, CPU seconds of this process)"""
    return time.perf_counter(), time.process_time()


def _busy_cores(since: tuple[float, float]) -> float | None:
    """The cores that this process has kept busy; None if too little time has passed to tell."""
    passed, used = (now - then for now, then in zip(_times(), since, strict=True))
    return used / passed if passed > 0.05 else None


def _settle() -> tuple[float, float]:
    """Wait until this process's threads sleep; kt-kernel's workers and OpenMP's threads spin for a while after their work.

    Returns:
        :func:`_times` afterwards.
    """
    deadline = time.perf_counter() + SETTLE_TIMEOUT
    while time.perf_counter() < deadline:
        used = time.process_time()
        time.sleep(0.06)
        if time.process_time() - used < 0.003:
            break
    return _times()
