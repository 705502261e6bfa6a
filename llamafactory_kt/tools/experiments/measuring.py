"""What one variant of a comparison gives: answers, their speed, next-token distributions, perplexity.

The first variant of all is the reference. Its distributions are kept on the disk, for others are computed after its
model is gone; theirs are along its answers, token by token.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch

from ...ground.errors import KTDataError
from ...ground.machine import gib
from ...integration.chat import LoadedChat
from ...integration.prompts import Prompt
from .generating import Answer, answer_all
from .plan import Group, Variant


@dataclass(frozen=True)
class Options:
    """How a comparison measures."""

    batch_size: int = 8
    kl_tokens: int = 64
    """tokens of each of the reference's answers along which distributions are compared"""
    seed: int = 0


@dataclass
class Row:
    """One prompt, one variant."""

    index: int
    text: str
    error: str
    answer_tokens: int
    kl: float | None = None
    """mean over tokens of KL(reference || this) of the next-token distributions, in nats"""
    top1: float | None = None
    """share of tokens where both find the same token the likeliest"""
    perplexity: float | None = None
    """of the row's own answer"""
    reference_tokens: int = 0
    """tokens of the row's own answer"""


@dataclass
class Measured:
    """One variant."""

    name: str
    rows: list[Row]
    load_seconds: float
    """to load the model, or to exchange the adapter of one that was loaded"""
    seconds: float
    """to generate all answers"""
    memory: int
    """resident memory of the process afterwards, in bytes"""
    gpu_memory: int
    """the most that torch had allocated on GPUs so far, in bytes"""
    notes: list[str] = field(default_factory=list)


def run_group(group: Group, prompts: list[Prompt], options: Options, folder: str, reference: str) -> list[Measured]:
    """Load the group's model once and measure its variants; called in a process of its own.

    Args:
        folder: where the reference's distributions are, or will be.
        reference: name of the reference variant.
    """
    return list(_measure_all(group, prompts, options, Path(folder), reference))


def _measure_all(
    group: Group, prompts: list[Prompt], options: Options, folder: Path, reference: str
) -> Iterable[Measured]:
    started = time.perf_counter()
    # The largest rank first, so that kernels are built with room for the others.
    first = max(group.variants, key=_rank) if len(group.variants) > 1 else group.variants[0]
    chat, current = LoadedChat.load(first.config), first if first.part == "on" else None
    for variant in group.variants:
        if current is None or _applied(variant) != _applied(current):
            _apply(chat.model, variant)
        current = variant
        ready = time.perf_counter() - started
        yield _measure(chat, variant, prompts, options, folder, variant.name == reference, ready)
        started = time.perf_counter()


def _rank(variant: Variant) -> int:
    from ...adapters import open_adapters

    adapters = open_adapters([str(Path(name).expanduser()) for name in variant.adapters])
    return max((adapters.rank(layer) for layer in adapters.layers), default=0)


def _applied(variant: Variant) -> tuple[Any, ...]:
    return (*variant.adapters, variant.part if variant.adapters else "off", variant.config.get("kt_lora_scope", "all"))


def _apply(model: Any, variant: Variant) -> None:
    """Put the variant's adapters, or its part of them, in place of what the model has."""
    from ...apply import load_moe_lora_from_adapter, switch_adapter

    paths = [str(Path(name).expanduser()) for name in variant.adapters]
    whole = variant.part in ("on", "attention")
    switch_adapter(model, paths if whole and paths else None, variant.config.get("kt_lora_scope", "all"))
    if variant.part == "attention":
        load_moe_lora_from_adapter(model, None)
    elif variant.part == "experts":
        load_moe_lora_from_adapter(model, paths)


def _measure(
    chat: LoadedChat, variant: Variant, prompts: list[Prompt], options: Options, folder: Path, is_reference: bool,
    load_seconds: float,
) -> Measured:  # fmt: skip
    from tqdm import tqdm

    chat.set_generating(variant.generating)
    answers: dict[int, Answer] = {}
    seconds = 0.0
    with tqdm(total=len(prompts), unit="prompt", desc=variant.name) as bar:
        started = time.perf_counter()
        for batch in answer_all(chat, prompts, batch_size=options.batch_size, seed=options.seed):
            seconds += time.perf_counter() - started
            answers |= {answer.index: answer for answer in batch}
            bar.update(len(batch))
            started = time.perf_counter()
    rows = []
    for prompt in prompts:
        answer = answers[prompt.index]
        rows.append(Row(prompt.index, answer.text, answer.error, answer.answer_tokens))
        if prompt.reference and not answer.error:
            rows[-1].perplexity, rows[-1].reference_tokens = perplexity(chat, prompt)
    measured = Measured(
        variant.name, rows, load_seconds, seconds, psutil.Process().memory_info().rss,
        sum(torch.cuda.max_memory_allocated(device) for device in range(torch.cuda.device_count())),
    )  # fmt: skip
    if is_reference:
        _keep(chat, prompts, answers, options.kl_tokens, folder)
    _compare(chat, prompts, measured, folder)
    return measured


@torch.inference_mode()
def log_probs(chat: LoadedChat, ids: Sequence[int], count: int) -> torch.Tensor:
    """Next-token log-probabilities of the last ``count`` of the tokens: [count, vocabulary], float32, on the CPU."""
    tokens = torch.tensor([ids], device=chat.model.device)
    logits: torch.Tensor = chat.model(input_ids=tokens, logits_to_keep=count + 1).logits[0, -count - 1 : -1]
    return logits.float().log_softmax(-1).cpu()


def perplexity(chat: LoadedChat, prompt: Prompt) -> tuple[float, int]:
    """(perplexity of the row's own answer, its tokens with the template's end)."""
    answer = chat.encode_reference(prompt)
    found = log_probs(chat, chat.encode(prompt)[0] + answer, len(answer))
    return math.exp(-float(found[range(len(answer)), answer].double().mean())), len(answer)


def _keep(chat: LoadedChat, prompts: list[Prompt], answers: dict[int, Answer], limit: int, folder: Path) -> None:
    wanted = {index: answer.token_ids[:limit] for index, answer in answers.items() if not answer.error}
    size = sum(map(len, wanted.values())) * chat.model.config.get_text_config().vocab_size * 4
    if size > (free := shutil.disk_usage(folder).free):
        raise KTDataError(
            f"The reference's distributions need {gib(size)} in {folder} and {gib(free)} are free; lower --kl-tokens, or "
            "set TMPDIR to a larger disk."
        )
    (folder / "vocabulary").write_text(_vocabulary(chat))
    for prompt in prompts:
        if tokens := wanted.get(prompt.index):
            found = log_probs(chat, chat.encode(prompt)[0] + tokens, len(tokens))
            torch.save((tokens, found), folder / f"{prompt.index}.pt")


def _compare(chat: LoadedChat, prompts: list[Prompt], measured: Measured, folder: Path) -> None:
    if (folder / "vocabulary").read_text() != _vocabulary(chat):
        measured.notes.append("another vocabulary than the reference's: distributions are not compared")
        return
    for prompt, row in zip(prompts, measured.rows, strict=True):
        path = folder / f"{prompt.index}.pt"
        if path.is_file() and not row.error:
            tokens, wanted = torch.load(path, weights_only=True)
            found = log_probs(chat, chat.encode(prompt)[0] + tokens, len(tokens))
            row.kl = float((wanted.exp() * (wanted - found)).double().sum(-1).mean())
            row.top1 = float((wanted.argmax(-1) == found.argmax(-1)).double().mean())


def _vocabulary(chat: LoadedChat) -> str:
    content = [chat.model.config.get_text_config().vocab_size, sorted(chat.tokenizer.get_vocab().items())]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()
