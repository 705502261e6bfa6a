"""Answer many prompts, in left-padded batches of similar length; those with pictures, videos or sound one by one."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ...ground.errors import KTConfigError
from ...integration.chat import LoadedChat
from ...integration.chat_config import read_yaml
from ...integration.prompts import Prompt, make_prompts


@dataclass(frozen=True)
class Answer:
    """The answer to one prompt, or why there is none."""

    index: int
    text: str = ""
    prompt_tokens: int = 0
    answer_tokens: int = 0
    """generated tokens, including the end token"""
    ms_per_token: float = 0.0
    """time of the batch, including prefill, over its decoding steps: the wait for a token, whatever the batch size"""
    finish_reason: str = ""
    """``stop``, or ``length`` if max_new_tokens ended it"""
    error: str = ""
    """why there is no answer; empty otherwise"""
    token_ids: list[int] = field(default_factory=list, repr=False)


@dataclass(frozen=True)
class _Encoded:
    prompt: Prompt
    ids: list[int]
    config: Any


def generate(
    chat: Mapping[str, Any] | str | Path | Any, prompts: Iterable[Any], *, batch_size: int = 8, seed: int | None = None,
    **generating: Any,
) -> list[Answer]:  # fmt: skip
    """Answer prompts with LLaMA-Factory's template and generating arguments, in batches.

    Args:
        chat: a configuration (dictionary, or the path of a YAML file), or a LLaMA-Factory ``ChatModel``.
        prompts: texts, lists of messages (``role`` and ``content``), or rows in alpaca, sharegpt or openai form; rows may have
            ``images``, ``videos`` and ``audios`` (paths; images also as Pillow's pictures or bytes).
        batch_size: prompts per batch.
        seed: for sampling; None leaves torch's generator as it is.
        generating: ``max_new_tokens``, ``do_sample``, ``temperature``, ``top_p``, ``top_k`` and the other arguments of
            ``ChatModel.chat``; they override the configuration's.

    Returns:
        One :class:`Answer` per prompt, in the same order. If its generation failed, ``error`` says why.

    Raises:
        KTDataError: A prompt is malformed.
        KTConfigError: A key or batch_size is wrong.

    Example:
        >>> from llamafactory_kt import generate
        >>> [answer] = generate("chat.yaml", ["Hello, who are you?"], do_sample=False)  # doctest: +SKIP
        >>> print(answer.text, f"{answer.ms_per_token:.1f} ms/token")                   # doctest: +SKIP
    """
    made = make_prompts(prompts)
    if isinstance(chat, str | Path):
        chat = read_yaml(chat)
    loaded = LoadedChat.load(chat) if isinstance(chat, Mapping) else LoadedChat.of(chat)
    batches = answer_all(loaded, made, batch_size=batch_size, seed=seed, **generating)
    return sorted((answer for batch in batches for answer in batch), key=lambda answer: answer.index)


def answer_all(
    chat: LoadedChat, prompts: Sequence[Prompt], *, batch_size: int = 8, seed: int | None = None, **generating: Any
) -> Iterator[list[Answer]]:
    """Yield each batch of answers when it is done, the longest prompts first, so that too little memory shows at once.

    Prompts that cannot be used come first, as errors.
    """
    if batch_size < 1:
        raise KTConfigError(f"batch_size must be at least 1, found {batch_size}.")
    if seed is not None:
        torch.manual_seed(seed)
    encoded, failed = [], []
    for prompt in prompts:
        try:
            if prompt.problem:
                raise ValueError(prompt.problem)
            ids, config, _ = chat.encode(prompt, **generating)  # pictures of all prompts could be more than memory
            encoded.append(_Encoded(prompt, ids, config))
        except Exception as error:  # a template may raise anything
            failed.append(Answer(prompt.index, error=str(error)))
    if failed:
        yield failed
    if encoded and encoded[0].config.max_new_tokens is None:
        raise KTConfigError("max_length counts the padding of a batch; set max_new_tokens instead.")
    for batch in _batches(encoded, batch_size):
        yield _answer_safely(chat, batch)


def _batches(encoded: list[_Encoded], size: int) -> list[list[_Encoded]]:
    """The longest first. Prompts with media are answered one by one, as in a chat: each model lays out a batch's pictures in its own way."""
    encoded = sorted(encoded, key=lambda item: -len(item.ids))
    texts = [item for item in encoded if not item.prompt.media]
    batches = [[item] for item in encoded if item.prompt.media]
    batches += [texts[start : start + size] for start in range(0, len(texts), size)]
    return sorted(batches, key=lambda batch: -len(batch[0].ids))


def _answer_safely(chat: LoadedChat, batch: list[_Encoded]) -> list[Answer]:
    """Answer a batch; if it fails, answer its prompts one by one, so that only those that fail alone have no answer."""
    try:
        return _answer(chat, batch)
    except Exception as error:
        if len(batch) == 1:
            return [Answer(batch[0].prompt.index, error=f"{type(error).__name__}: {error}")]
    return [answer for item in batch for answer in _answer_safely(chat, [item])]


@torch.inference_mode()
def _answer(chat: LoadedChat, batch: list[_Encoded]) -> list[Answer]:
    config, tokenizer = batch[0].config, chat.tokenizer
    width = max(len(item.ids) for item in batch)
    ids = torch.full((len(batch), width), config.pad_token_id)
    mask = torch.zeros_like(ids)
    for row, item in enumerate(batch):
        ids[row, width - len(item.ids) :] = torch.tensor(item.ids)
        mask[row, width - len(item.ids) :] = 1
    device = chat.model.device
    media = chat.encode(batch[0].prompt).media if batch[0].prompt.media else {}
    started = time.perf_counter()
    output = chat.model.generate(
        inputs=ids.to(device), attention_mask=mask.to(device), generation_config=config, **media
    )
    output = output[:, width:].cpu()
    seconds = time.perf_counter() - started
    ends = set(config.eos_token_id)
    answers = []
    for item, new in zip(batch, output.tolist(), strict=True):
        end = next((place for place, token in enumerate(new) if token in ends), None)
        kept = new if end is None else new[: end + 1]
        text = tokenizer.decode(
            kept, skip_special_tokens=getattr(config, "skip_special_tokens", True), clean_up_tokenization_spaces=True
        )
        answers.append(Answer(
            item.prompt.index, text, len(item.ids), len(kept), 1000 * seconds / max(1, output.shape[1]),
            "length" if end is None else "stop", token_ids=kept,
        ))  # fmt: skip
    return answers
