"""Measure the variants of a comparison: answers, their speed, next-token distributions, perplexity.

The first variant is the reference. The others are compared with its distributions along its answers. These are kept on
disk, because the reference's model is unloaded before the others run.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import pad

from ...ground.atomic_output import replacing, writing
from ...ground.errors import KTDataError
from ...ground.machine import gib
from ...integration.chat import LoadedChat
from ...integration.prompts import Prompt
from ...model.growing_cache import through_cache
from ..process_memory import peak_gpu_memory, resident_memory
from .generating import Answer, answer_all
from .plan import Variant


@dataclass(frozen=True)
class CompareOptions:
    """How a comparison measures."""

    batch_size: int = 8
    kl_tokens: int = 64
    """tokens of each reference answer along which distributions are compared"""
    seed: int = 0


@dataclass
class PromptResult:
    """One prompt of one variant."""

    index: int
    text: str
    error: str
    answer_tokens: int
    kl: float | None = None
    """mean over tokens of KL(reference || this) of the next-token distributions, in nats"""
    top1: float | None = None
    """share of tokens for which both have the same most likely token"""
    perplexity: float | None = None
    """of the prompt's own answer"""
    reference_tokens: int = 0
    """tokens of the prompt's own answer"""


@dataclass
class VariantResult:
    """All prompts of one variant."""

    name: str
    rows: list[PromptResult]
    load_seconds: float
    """to load the model, or to exchange the adapter of a loaded one"""
    seconds: float
    """to generate all answers"""
    memory: int
    """resident memory of the process afterwards, in bytes"""
    gpu_memory: int
    """peak memory that torch allocated on GPUs so far, in bytes"""
    notes: list[str] = field(default_factory=list)


def run_group(
    group: list[Variant], prompts: list[Prompt], options: CompareOptions, folder: str, reference: str
) -> list[VariantResult]:
    """Load the model of a group once and measure its variants; called in its own process.

    Args:
        group: variants that one loaded model can serve.
        folder: where the reference's distributions are, or will be.
        reference: name of the reference variant.
    """
    started = time.perf_counter()
    # Load the largest rank first, so that the kernels have room for the others.
    first = max(group, key=_rank) if len(group) > 1 else group[0]
    chat, current = LoadedChat.load(first.config), _adapter_state(first) if first.part == "on" else None
    results = []
    for variant in group:
        if _adapter_state(variant) != current:
            _apply(chat.model, variant)
        current = _adapter_state(variant)
        ready = time.perf_counter() - started
        results.append(_measure(chat, variant, prompts, options, Path(folder), variant.name == reference, ready))
        started = time.perf_counter()
    return results


def _rank(variant: Variant) -> int:
    from ...adapters import open_adapters

    adapters = open_adapters(_paths(variant))
    return max((adapters.rank(layer) for layer in adapters.layers), default=0)


def _paths(variant: Variant) -> list[str]:
    return [str(Path(name).expanduser()) for name in variant.adapters]


def _adapter_state(variant: Variant) -> tuple[Any, ...]:
    return (*variant.applied, variant.config.get("kt_lora_scope", "all"))


def _apply(model: Any, variant: Variant) -> None:
    """Replace the model's adapters by the variant's, or its part of them."""
    from ...apply import load_moe_lora_from_adapter, switch_adapter

    paths = _paths(variant)
    whole = variant.part in ("on", "attention")
    switch_adapter(model, paths if whole and paths else None, variant.config.get("kt_lora_scope", "all"))
    if variant.part == "attention":
        load_moe_lora_from_adapter(model, None)
    elif variant.part == "experts":
        load_moe_lora_from_adapter(model, paths)


def _measure(
    chat: LoadedChat, variant: Variant, prompts: list[Prompt], options: CompareOptions, folder: Path,
    is_reference: bool, load_seconds: float,
) -> VariantResult:  # fmt: skip
    from tqdm import tqdm

    chat.set_generating(variant.generating)
    answers: dict[int, Answer] = {}
    for _ in answer_all(chat, prompts[:1], max_new_tokens=4):
        pass  # after a load or an exchange, the first tokens do what the others need not
    started = time.perf_counter()
    with tqdm(total=len(prompts), unit="prompt", desc=variant.name) as bar:
        for batch in answer_all(chat, prompts, batch_size=options.batch_size, seed=options.seed):
            answers |= {answer.index: answer for answer in batch}
            bar.update(len(batch))
    seconds = time.perf_counter() - started
    rows = []
    for prompt in prompts:
        answer = answers[prompt.index]
        row = PromptResult(prompt.index, answer.text, answer.error, answer.answer_tokens)
        if prompt.reference and not answer.error:
            row.perplexity, row.reference_tokens = perplexity(chat, prompt)
        rows.append(row)
    result = VariantResult(variant.name, rows, load_seconds, seconds, resident_memory(), peak_gpu_memory())
    if is_reference:
        _keep_distributions(chat, prompts, answers, options.kl_tokens, folder)
    _compare_distributions(chat, prompts, result, folder)
    return result


@torch.inference_mode()
def log_probs(chat: LoadedChat, prompt: Prompt, answer: Sequence[int]) -> torch.Tensor:
    """Next-token log-probabilities along an answer to a prompt: [len(answer), vocabulary], float32, on the CPU."""
    ids, _, media = chat.encode(prompt)
    tokens, count = torch.tensor([[*ids, *answer]], device=chat.model.device), len(answer)
    for name in (name for name in media if name.endswith("token_type_ids")):
        media[name] = pad(media[name], (0, count))  # with zeros: text
    keys = {"logits_to_keep": count + 1, **through_cache(chat.model), **media}
    logits: torch.Tensor = chat.model(input_ids=tokens, **keys).logits[0, -count - 1 : -1]
    return logits.float().log_softmax(-1).cpu()


def perplexity(chat: LoadedChat, prompt: Prompt) -> tuple[float, int]:
    """(perplexity of the prompt's own answer, its tokens with the template's end)."""
    answer = chat.encode_reference(prompt)
    found = log_probs(chat, prompt, answer)
    return math.exp(-float(found[range(len(answer)), answer].double().mean())), len(answer)


def _keep_distributions(
    chat: LoadedChat, prompts: list[Prompt], answers: dict[int, Answer], limit: int, folder: Path
) -> None:
    wanted = {index: answer.token_ids[:limit] for index, answer in answers.items() if not answer.error}
    size = sum(map(len, wanted.values())) * chat.model.config.get_text_config().vocab_size * 4
    if size > (free := shutil.disk_usage(folder).free):
        raise KTDataError(
            f"The reference's distributions need {gib(size)} in {folder} and {gib(free)} are free; lower --kl-tokens, or "
            "set TMPDIR to a larger disk."
        )
    with writing(folder / "vocabulary"):
        (folder / "vocabulary").write_text(_vocabulary(chat))
    for prompt in prompts:
        if tokens := wanted.get(prompt.index):
            found = log_probs(chat, prompt, tokens)
            with replacing(folder / f"{prompt.index}.pt") as temporary:
                torch.save((tokens, found), temporary)


def _compare_distributions(chat: LoadedChat, prompts: list[Prompt], result: VariantResult, folder: Path) -> None:
    if (folder / "vocabulary").read_text() != _vocabulary(chat):
        result.notes.append("another vocabulary than the reference's: distributions are not compared")
        return
    for prompt, row in zip(prompts, result.rows, strict=True):
        path = folder / f"{prompt.index}.pt"
        if path.is_file() and not row.error:
            tokens, wanted = torch.load(path, weights_only=True)
            found = log_probs(chat, prompt, tokens)
            row.kl = float((wanted.exp() * (wanted - found)).double().sum(-1).mean())
            row.top1 = float((wanted.argmax(-1) == found.argmax(-1)).double().mean())


def _vocabulary(chat: LoadedChat) -> str:
    """A hash of the vocabulary."""
    content = [chat.model.config.get_text_config().vocab_size, sorted(chat.tokenizer.get_vocab().items())]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()
