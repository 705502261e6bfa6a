"""The process of one configuration: it loads, and measures when it is asked to."""

from __future__ import annotations

import contextlib
import os
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from ...ground.errors import one_line
from .figures import Loaded
from .rows import Row

Prepare = Callable[[int], None]
"""Told how many tokens the model gets next."""


def serve(pipe: Connection, row: Row, prompt_tokens: Sequence[int]) -> None:
    """Send a :class:`Loaded`, or a text why that failed; then answer ``(length, new tokens)`` with (time of the prompt,
    median time of a token, cores kept busy since the last answer), and ``("end",)`` with (peak memory, GPU memory)."""
    os.dup2(2, 1)  # LLaMA-Factory and kt-kernel write to stdout, where only the report belongs
    os.environ.setdefault("LLAMAFACTORY_VERBOSITY", "WARN")
    try:
        model, loaded, prepare = _load(row, prompt_tokens)
        for length in prompt_tokens:
            measure(model, length, 2, prepare)  # what only the first calls do
        _forget_peak()
    except Exception as error:
        pipe.send(one_line(error))
        return
    settle()
    resting = Resting()
    pipe.send(loaded)
    with contextlib.suppress(EOFError):  # whoever asked is gone
        while (words := pipe.recv()) != ("end",):
            idle, (length, new_tokens) = resting.cores(), words
            prefill, decode = measure(model, length, new_tokens, prepare)
            settle()
            resting = Resting()
            pipe.send((prefill, decode, idle))
        pipe.send((resident_memory("VmHWM"), _gpu_memory()))


def check(pipe: Connection, rows: Sequence[Row]) -> None:
    """Send the names of configurations whose keys are refused, with the reasons; no weights are read."""
    os.dup2(2, 1)
    from ...integration import bootstrap

    bootstrap.activate()
    from ...integration.chat_config import parse

    refused = []
    for row in rows:
        try:
            parse(row.config)
        except Exception as error:
            refused.append((row.name, one_line(error)))
    pipe.send(refused)


def _load(row: Row, prompt_tokens: Sequence[int]) -> tuple[Any, Loaded, Prepare]:
    from ...integration.chat import LoadedChat, import_chat
    from ...integration.chat_config import open_configured, parse
    from ...model.state import has_kt_experts, kt_state
    from .sizes import Sizes
    from .stock import BestExperts, merge_into

    import_chat()
    args = parse(row.config) if row.stock else None
    adapters = open_configured(args) if row.stock else None
    before, started = resident_memory(), time.perf_counter()
    model = LoadedChat.load(row.loaded_config).model
    load = time.perf_counter() - started
    prepare: Prepare = lambda tokens: None  # noqa: E731
    measure(model, min(prompt_tokens), 2, prepare)  # so that weights that are only mapped so far are resident
    resident = resident_memory()
    peak = max(resident, resident_memory("VmHWM"))  # which the kernel notes only now and then
    push = None
    if args is not None and adapters is not None:
        model = merge_into(model, adapters, args.kt_lora_scope)
        prepare = best = BestExperts(model, prompt_tokens)
        engine = f"transformers, {best}: {_threads()}"
    elif has_kt_experts(model):
        push = _push_again(model)
        engine = str(kt_state(model).plan)
    else:
        engine = f"transformers: {_threads()}"
    return model, Loaded(engine, load, before, resident, peak, *Sizes.of(model), push=push), prepare


def _threads() -> str:
    """As a plan puts it."""
    import torch

    return f"torch {torch.get_num_threads()}"


def _push_again(model: Any) -> float | None:
    """Seconds a layer to load the expert LoRA that the model has once more; None where it has none, or has it merged."""
    from ...apply import load_moe_lora_from_adapter
    from ...model.state import kt_state

    state = kt_state(model)
    adapters = state.expert_adapters
    if not adapters.layers or state.merged is not None:
        return None
    started = time.perf_counter()
    load_moe_lora_from_adapter(model, adapters)
    return (time.perf_counter() - started) / len(adapters.layers)


def measure(model: Any, length: int, new_tokens: int, prepare: Prepare) -> tuple[float, float]:
    """(seconds of a random prompt, median seconds of one of the greedy tokens after it), generated as LLaMA-Factory's
    chats do: by ``generate`` in a thread of its own."""
    import torch

    vocabulary = model.config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(length)
    ids = torch.randint(10, vocabulary, (1, length), generator=generator).to(model.device)
    clock = _Clock(prepare)
    prepare(length)
    with ThreadPoolExecutor(1) as thread:
        answer = thread.submit(
            model.generate, input_ids=ids, attention_mask=torch.ones_like(ids), streamer=clock, do_sample=False,
            max_new_tokens=new_tokens + 1, eos_token_id=vocabulary, pad_token_id=0,  # which no token has, so none ends it
        )  # fmt: skip
        answer.result()
    prompt, *tokens = (after - before for before, after in pairwise(clock.times))
    return prompt, statistics.median(tokens)


class _Clock:
    """Streamer that notes when the prompt goes in and each token comes out."""

    def __init__(self, prepare: Prepare):
        self.times: list[float] = []
        self._prepare = prepare

    def put(self, _: Any) -> None:
        self.times.append(time.perf_counter())
        if len(self.times) == 2:
            self._prepare(1)

    def end(self) -> None:
        """Nothing is held back."""


class Resting:
    """The cores that this process keeps busy from now on."""

    def __init__(self) -> None:
        self._started, self._used = time.perf_counter(), time.process_time()

    def cores(self) -> float | None:
        """None where too little time has passed to tell."""
        passed = time.perf_counter() - self._started
        return (time.process_time() - self._used) / passed if passed > 0.05 else None


def settle(longest: float = 2.0) -> None:
    """Wait until this process's threads sleep: kt-kernel's workers spin for 50 ms after their work, OpenMP's a while."""
    deadline = time.perf_counter() + longest
    while time.perf_counter() < deadline:
        used = time.process_time()
        time.sleep(0.06)
        if time.process_time() - used < 0.003:
            return


def resident_memory(field: str = "VmRSS") -> int:
    """Bytes; ``VmHWM`` is the most there was (proc_pid_status(5))."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    return 0


def _forget_peak() -> None:
    """Let VmHWM begin anew (proc_pid_clear_refs(5)); where that is forbidden, the peak includes loading."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _gpu_memory() -> int:
    import torch

    return sum(torch.cuda.max_memory_allocated(number) for number in range(torch.cuda.device_count()))
