"""The tokens of an answer with their probabilities, in the form of OpenAI's API, and which of them a piece of its text has."""

from __future__ import annotations

import codecs
import functools
import json
import re
from collections.abc import Callable
from typing import Any

from ...decoding.choosing import Chosen


class Vocabulary:
    """The bytes of tokens.

    Args:
        tokenizer: of transformers.
        hidden: tokens that are not part of a text.
    """

    def __init__(self, tokenizer: Any, hidden: frozenset[int]):
        self._tokenizer, self._hidden = tokenizer, hidden
        self._added = {number: str(token) for number, token in tokenizer.added_tokens_decoder.items()}
        backend = getattr(tokenizer, "backend_tokenizer", None)
        self._decoder = json.dumps(json.loads(backend.to_str())["decoder"]) if backend is not None else None

    def bytes_of(self, token: int) -> bytes:
        """What a token adds to a text: often a part of a character. Nothing for a hidden one.

        Of tokenizers that are not of the library tokenizers, a part of a character is U+FFFD.
        """
        if token in self._hidden:
            return b""
        if token in self._added:
            return self._added[token].encode()
        if self._decoder is None:
            return str(self._tokenizer.decode([token])).encode()
        written = self._tokenizer.convert_ids_to_tokens(token)
        if written is None:  # logits beyond the tokenizer's tokens
            return b""
        if '"ByteLevel"' in self._decoder:
            return bytes(_BYTES[letter] for letter in written)
        if '"ByteFallback"' in self._decoder and (found := re.fullmatch("<0x([0-9A-F]{2})>", written)):
            return bytes.fromhex(found[1])
        return str(written).replace("\u2581", " ").encode()

    def described(self, token: int, logprob: float) -> dict[str, Any]:
        """A token as OpenAI's API has it."""
        raw = self.bytes_of(token)
        return {"token": raw.decode(errors="replace"), "logprob": max(logprob, -9999.0), "bytes": list(raw)}


def _bytes_of_letters() -> dict[str, int]:
    """The letter that byte-level BPE writes for each byte: printable ones as they are, the others from U+0100 on (GPT-2's encoder.py)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + number): byte for number, byte in enumerate(others)}


_BYTES = _bytes_of_letters()


@functools.lru_cache(maxsize=4)
def vocabulary_of(tokenizer: Any, hides: bool) -> Vocabulary:
    """The vocabulary of a chat; with hides, its special tokens are no text."""
    return Vocabulary(tokenizer, frozenset(tokenizer.all_special_ids) if hides else frozenset())


class TokensOfText:
    """The tokens of an answer that have not been reported yet.

    Args:
        chosen: the answer's tokens, more and more of them.
    """

    def __init__(self, chosen: Callable[[], list[Chosen]], vocabulary: Vocabulary):
        self._chosen, self._vocabulary = chosen, vocabulary
        self._reported, self._characters = 0, 0
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def take(self, characters: float = float("inf")) -> list[tuple[int, Chosen, dict[str, Any]]]:
        """The next tokens, up to those that begin behind so many characters of the text: (the character at which it begins, the token, as
        OpenAI's API describes it)."""
        taken = []
        chosen = self._chosen()
        while self._reported < len(chosen) and self._characters < characters:
            one = chosen[self._reported]
            raw = self._vocabulary.bytes_of(one.token)
            if raw:
                taken.append((self._characters, one, self._describe(one)))
            self._characters += len(self._decoder.decode(raw))
            self._reported += 1
        return taken

    def _describe(self, one: Chosen) -> dict[str, Any]:
        likeliest = [self._vocabulary.described(*other) for other in one.likeliest]
        return self._vocabulary.described(one.token, one.logprob) | {"top_logprobs": likeliest}
