"""Answers that follow a JSON Schema or a grammar: which tokens may come next, by llguidance, an optional dependency."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import numpy as np

from ..ground.errors import KTConfigError, KTDataError, describe, one_line

INSTALL = "pip install llguidance"
_JSON = {"whitespace_pattern": r"\x0A?\x20{0,16}"}
"""Between JSON's signs: one line, or indented lines. Without an end, a model could write blanks for as long as it may."""


def is_installed() -> bool:
    """Whether there is llguidance."""
    return find_spec("llguidance") is not None


class Grammars:
    """Makes grammars for one tokenizer.

    Args:
        tokenizer: of transformers.
        size: V, the number of logits.
        ends: the tokens that end an answer.

    Raises:
        KTConfigError: There is no llguidance, or the tokenizer is not one of the library tokenizers.
    """

    def __init__(self, tokenizer: Any, size: int, ends: list[int]):
        if not is_installed():
            raise KTConfigError(f"Answers that follow a grammar need llguidance: {INSTALL}.")
        from llguidance import hf

        try:
            self._tokens = hf.from_tokenizer(tokenizer, n_vocab=size, eos_token=ends)
        except Exception as error:  # Rust's errors, of any type
            raise KTConfigError(
                f"llguidance cannot read this model's tokenizer, {type(tokenizer).__name__}: {describe(error)}"
            ) from error
        self._size = size

    def json_schema(self, schema: dict[str, Any]) -> Callable[[], Matching]:
        """What makes a matcher for JSON that follows a schema.

        Raises:
            KTDataError: The schema is wrong, or has keywords that llguidance does not know.
        """
        from llguidance import LLMatcher

        try:
            grammar = LLMatcher.grammar_from_json_schema(json.dumps(schema), overrides=_JSON)
        except ValueError as error:  # nested too deeply
            raise KTDataError(f"The grammar cannot be used: {one_line(error)}") from error
        return self._maker(grammar)

    def calls(self, forms: list[tuple[str, dict[str, Any], str]]) -> Callable[[], Matching]:
        """What makes a matcher for one of several texts.

        Args:
            forms: text, JSON Schema, text, as each of them is.

        Raises:
            KTDataError: As with :meth:`json_schema`.
        """
        from llguidance import LLMatcher

        rules = [
            f"{_quoted(before)} %json {json.dumps({**schema, 'x-guidance': _JSON})} {_quoted(after)}"
            for before, schema, after in forms
        ]
        return self._maker(LLMatcher.grammar_from_lark(f"start: {' | '.join(rules)}"))

    def _maker(self, grammar: str) -> Callable[[], Matching]:
        from llguidance import LLMatcher, LLParserLimits

        limits = LLParserLimits(verbose_errors=False)
        if problem := LLMatcher.validate_grammar(grammar, self._tokens, limits=limits):
            raise KTDataError(f"The grammar cannot be used: {problem}")
        maker = functools.partial(Matching, LLMatcher(self._tokens, grammar, log_level=0, limits=limits), self._size)
        maker().allowed()  # some are found out only here
        return maker


class Matching:
    """A :class:`~.choosing.Matcher` by llguidance."""

    def __init__(self, grammar: Any, size: int):
        self._matcher, self._size = grammar.deep_copy(), size

    def allowed(self) -> np.ndarray:
        """bool [V]

        Raises:
            KTDataError: The grammar takes more time or memory than llguidance allows.
        """
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        self._check()
        return np.unpackbits(bits, bitorder="little")[: self._size].astype(bool)

    def accept(self, token: int) -> None:
        """Go on by a token.

        Raises:
            KTDataError: As with :meth:`allowed`.
        """
        self._matcher.consume_token(token)
        self._check()

    def _check(self) -> None:
        if self._matcher.is_error():
            raise KTDataError(f"The answer cannot follow the grammar: {self._matcher.get_error()}")


def _quoted(text: str) -> str:
    """As Lark writes a text."""
    return json.dumps(text, ensure_ascii=False)
