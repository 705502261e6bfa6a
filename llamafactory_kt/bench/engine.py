"""How fast configurations answer on this machine: each in a process of its own, measured in turn, round by round.

Absolute times drift with whatever else the machine does, so what counts is the ratio of figures of the same round.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any

from ..errors import KTConfigError, KTError

_KT_KEYS = ("use_kt", "adapter_name_or_path")


@dataclass
class Measured:
    """One configuration; times in seconds, one entry a round."""

    name: str
    load: float
    memory: int = 0
    """the most resident memory of its process, in bytes"""
    gpu_memory: int = 0
    """the most that torch had allocated on GPUs, in bytes"""
    prefill: dict[int, list[float]] = field(default_factory=dict)
    """prompt tokens -> time of the prompt, which is the time to the first token"""
    decode: dict[int, list[float]] = field(default_factory=dict)
    """prompt tokens -> median time of one more token"""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def ratio(measured: Sequence[float], against: Sequence[float]) -> float:
    """The median over rounds of ``against / measured``: above 1, the measured one is faster.

    >>> ratio([2.0, 4.0, 1.0], [4.0, 4.0, 3.0])
    2.0
    """
    return statistics.median(other / own for own, other in zip(measured, against, strict=True))


def variants(config: Mapping[str, Any], against: Sequence[str]) -> dict[str, dict[str, Any]]:
    """name -> configuration: the given one first, then a variant for each word of ``against``.

    Args:
        against: ``base`` (without the adapter), ``stock`` (neither adapter nor use_kt), or ``key=value``.

    Raises:
        KTConfigError: A word is none of these.
    """
    import yaml

    found = {"as configured": dict(config)}
    for word in against:
        key, equals, value = word.partition("=")
        if word == "base":
            found[word] = {k: v for k, v in config.items() if k not in ("adapter_name_or_path", "kt_moe_lora_path")}
        elif word == "stock":
            found[word] = {k: v for k, v in config.items() if k not in _KT_KEYS and not k.startswith("kt_")}
        elif equals:
            found[word] = {**config, key: yaml.safe_load(value)}
        else:
            raise KTConfigError(f"--against: unknown word {word!r}, expected base, stock or key=value.")
    return found


def bench(
    configs: Mapping[str, Mapping[str, Any]],
    prompt_tokens: Sequence[int] = (128,),
    new_tokens: int = 32,
    rounds: int = 5,
    tick: Callable[[], object] = lambda: None,
) -> list[Measured]:
    """Load all configurations, then measure them in turn.

    Args:
        configs: name -> LLaMA-Factory configuration for chatting.
        prompt_tokens: lengths of random prompts.
        new_tokens: tokens generated after each.
        tick: called after each load and each measurement.

    Raises:
        KTError: A configuration cannot be loaded; the message names it.
    """
    subjects = []
    try:
        for name, config in configs.items():
            subjects.append(_Subject(name, config))
            tick()
        for _ in range(rounds):
            for length in prompt_tokens:
                for subject in subjects:
                    subject.measure(length, new_tokens)
                    tick()
        return [subject.end() for subject in subjects]
    finally:
        for subject in subjects:
            subject.process.kill()


class _Subject:
    def __init__(self, name: str, config: Mapping[str, Any]):
        context = get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, dict(config)), daemon=True)
        self.process.start()
        theirs.close()
        try:
            self.measured = Measured(name, self._ask())
        except BaseException:
            self.process.kill()
            raise

    def _ask(self, *words: Any) -> Any:
        if words:
            self._pipe.send(words)
        try:
            answer = self._pipe.recv()
        except EOFError:
            raise KTError("The process of a configuration ended without a word; see its output above.") from None
        if isinstance(answer, str):
            raise KTConfigError(f"The configuration cannot be measured: {answer}")
        return answer

    def measure(self, length: int, new_tokens: int) -> None:
        prefill, decode = self._ask(length, new_tokens)
        self.measured.prefill.setdefault(length, []).append(prefill)
        self.measured.decode.setdefault(length, []).append(decode)

    def end(self) -> Measured:
        self.measured.memory, self.measured.gpu_memory = self._ask("end")
        return self.measured


def _serve(pipe: Connection, config: dict[str, Any]) -> None:
    """A configuration's process: loads, and measures when it is asked to."""
    os.environ.setdefault("LLAMAFACTORY_VERBOSITY", "WARN")
    started = time.perf_counter()
    try:
        from .. import bootstrap

        bootstrap.activate()
        from llamafactory.chat import ChatModel

        started = time.perf_counter()  # imports are no part of a load
        model = ChatModel(config).engine.model
        for length in (8, 8):
            _measure(model, length, 2)  # what only the first call does
    except Exception as error:
        pipe.send(" ".join(str(error).split()) or type(error).__name__)
        return
    pipe.send(time.perf_counter() - started)
    while (words := pipe.recv()) != ("end",):
        pipe.send(_measure(model, *words))
    pipe.send(_memory())


def _measure(model: Any, length: int, new_tokens: int) -> tuple[float, float]:
    """(seconds of a random prompt, median seconds of one of the greedy tokens after it)."""
    import torch

    generator = torch.Generator().manual_seed(length)
    ids = torch.randint(10, model.config.get_text_config().vocab_size, (1, length), generator=generator)
    ids, cache, times = ids.to(model.device), None, []
    with torch.inference_mode():
        for _ in range(new_tokens + 1):
            started = time.perf_counter()
            out = model(input_ids=ids, past_key_values=cache, use_cache=True)
            ids, cache = out.logits[:, -1:].argmax(-1), out.past_key_values
            ids.tolist()  # waits for a GPU
            times.append(time.perf_counter() - started)
    return times[0], statistics.median(times[1:])


def _memory() -> tuple[int, int]:
    import resource

    import torch

    gpu = sum(torch.cuda.max_memory_allocated(number) for number in range(torch.cuda.device_count()))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, gpu
