"""What runs in the processes of ``bench --quality``: the reference, whose distributions are kept on disk, and what is compared with it."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ....ground.atomic_output import writing
from ....ground.errors import KTDataError, KTModelError, one_line
from ....ground.machine import gib
from ....model.growing_cache import through_cache
from ..configs import BenchConfig
from .results import TokenFigures, losses


class Cut(NamedTuple):
    """How a text is cut into chunks; what is left over is not used."""

    context: int
    """tokens of a chunk"""
    limit: int
    """the most chunks"""

    @property
    def predicted(self) -> int:
        """Tokens of a chunk that count. As in llama.cpp, each has at least half of the context before it."""
        return self.context - self.context // 2 - 1


class Tokens(NamedTuple):
    """A text in tokens."""

    total: int
    chunks: list[list[int]]


def serve_reference(pipe: Connection, config: BenchConfig, name: str, text: str, cut: Cut, folder: Path) -> None:
    """Send (the engine, :class:`Tokens`); then answer each number of a chunk with the losses of its tokens, and keep its distributions
    in ``folder``. A string is an error."""

    def load() -> tuple[Any, Callable[[int], Any]]:
        tokens = _tokenize(config, name, text, cut, folder)
        from ....integration.model.loader import in_dtype

        with in_dtype(torch.float32):
            model, engine = _load(config)

        def answer(number: int) -> list[float]:
            found, targets = _log_probs(model, tokens.chunks[number], cut.predicted)
            with writing(path := folder / f"{number}.pt"):
                torch.save(found, path)
            return losses(found, targets)

        return (engine, tokens), answer

    _serve(pipe, load)


def serve_compared(pipe: Connection, config: BenchConfig, chunks: list[list[int]], cut: Cut, folder: Path) -> None:
    """Send the engine in a tuple; then answer each number of a chunk with its :class:`TokenFigures`. A string is an error."""

    def load() -> tuple[Any, Callable[[int], Any]]:
        model, engine = _load(config)

        def answer(number: int) -> TokenFigures:
            wanted = torch.load(folder / f"{number}.pt", weights_only=True, mmap=True)
            found, targets = _log_probs(model, chunks[number], cut.predicted)
            return TokenFigures.of(found, wanted, targets)

        return (engine,), answer

    _serve(pipe, load)


def _serve(pipe: Connection, load: Callable[[], tuple[Any, Callable[[int], Any]]]) -> None:
    os.dup2(2, 1)  # LLaMA-Factory and kt-kernel write to stdout, which is for the report
    os.environ.setdefault("LLAMAFACTORY_VERBOSITY", "WARN")
    try:
        first, answer = load()
        pipe.send(first)
        with contextlib.suppress(EOFError):  # the parent has what it wanted, or is gone
            while True:
                (number,) = pipe.recv()
                pipe.send(answer(number))
    except Exception as error:
        pipe.send(one_line(error))


def _load(config: BenchConfig) -> tuple[Any, str]:
    """(model, what computes its experts)"""
    from ....integration.chat import LoadedChat, import_chat
    from ....integration.chat_config import open_configured, parse
    from ....integration.model.loader import for_text_alone
    from ....model.state import has_kt_experts, kt_state
    from ..stock import merge_into

    import_chat()
    if config.stock:
        args = parse(config.config)
        with for_text_alone():
            model = LoadedChat.load(config.loaded_config).model
        return merge_into(model, open_configured(args), args.kt_lora_scope), "transformers"
    model = LoadedChat.load(config.loaded_config).model
    return model, str(kt_state(model).plan) if has_kt_experts(model) else "transformers"


def _tokenize(config: BenchConfig, name: str, text: str, cut: Cut, folder: Path) -> Tokens:
    """Cut the text into chunks, before anything heavy is loaded. Where the tokenizer begins a text with a token of its own, so does
    each chunk, in place of its first token."""
    from ....integration.chat import load_tokenizer

    tokenizer, vocabulary = load_tokenizer(config.loaded_config)
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    if len(ids) < cut.context:
        raise KTDataError(
            f"{name} has {len(ids)} tokens, fewer than one chunk of {cut.context}. Give a longer text, or a smaller --context."
        )
    count = min(cut.limit, len(ids) // cut.context)
    size = count * cut.predicted * vocabulary * 4
    if size > (free := shutil.disk_usage(folder).free):
        raise KTDataError(
            f"The reference's distributions need {gib(size)} in {folder} and {gib(free)} are free; lower --chunks, or set TMPDIR "
            "to a larger disk."
        )
    chunks = [ids[start : start + cut.context] for start in range(0, count * cut.context, cut.context)]
    if (first := tokenizer("a").input_ids[0]) == tokenizer.bos_token_id:
        chunks = [[first, *chunk[1:]] for chunk in chunks]
    return Tokens(len(ids), chunks)


@torch.inference_mode()
def _log_probs(model: Any, chunk: list[int], predicted: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(log-probabilities [predicted, vocabulary] float32, the tokens that follow [predicted]) of a chunk's last tokens, on the CPU."""
    ids = torch.tensor([chunk])
    keys = {"logits_to_keep": predicted + 1, "use_cache": False, **through_cache(model)}
    logits = model(input_ids=ids.to(model.device), **keys).logits[0]
    found = logits[-predicted - 1 : -1].float().log_softmax(-1).cpu()
    if found.isnan().any():
        raise KTModelError("its logits for the text hold NaN or Inf.")
    return found, ids[0, -predicted:]
