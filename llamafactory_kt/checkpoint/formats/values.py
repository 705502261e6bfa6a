"""The values of a ``quantization_config``, each one read with its type checked."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from ...ground.errors import KTModelError


class Values:
    """A JSON object of a file. A key that is missing or null has its default value.

    Args:
        found: what stands there.
        file: for messages, as ``config.json of models/m``.
        path: of the object in the file, for messages.

    Raises:
        KTModelError: It is no object; each method: a value is of another type.
    """

    def __init__(self, found: Any, file: str, path: str):
        self.file, self._path = file, path
        if not isinstance(found, Mapping):
            raise self._wrong(None, found, "an object {…}")
        self.found = found

    def integer(self, *keys: str, default: int | None = None) -> int | None:
        """Of the first key that is there."""
        key, found = self._first(keys)
        if found is None:
            return default
        if not isinstance(found, int) or isinstance(found, bool):
            raise self._wrong(key, found, "an integer")
        return found

    def group_size(self, *keys: str, default: int | None = None) -> int | None:
        """How many columns share a scale; None for all of a row, which is stored as -1."""
        key, _ = self._first(keys)
        size = self.integer(*keys, default=default)
        if size is not None and size < 1 and size != -1:
            raise self._wrong(key, size, "-1 or a positive integer")
        return None if size == -1 else size

    def block(self, key: str) -> tuple[int, int] | None:
        """Rows and columns of a block, ``[128, 128]`` or ``"128x128"``."""
        found = self.found.get(key)
        if found is None:
            return None
        if isinstance(found, str) and re.fullmatch(r"\d+x\d+", found):
            found = [int(size) for size in found.split("x")]
        if not (isinstance(found, list | tuple) and len(found) == 2 and all(type(n) is int and n > 0 for n in found)):
            raise self._wrong(key, found, "two sizes such as [128, 128]")
        return found[0], found[1]

    def flag(self, key: str, *, default: bool) -> bool:
        found = self.found.get(key)
        if not isinstance(found, bool | None):
            raise self._wrong(key, found, "true or false")
        return default if found is None else found

    def text(self, *keys: str, default: str | None = None) -> str | None:
        """Of the first key that is there."""
        key, found = self._first(keys)
        if not isinstance(found, str | None):
            raise self._wrong(key, found, "a string")
        return default if found is None else found

    def texts(self, key: str) -> list[str]:
        found = self.found.get(key)
        if found is None:
            return []
        if not isinstance(found, list | tuple) or not all(isinstance(item, str) for item in found):
            raise self._wrong(key, found, "a list of strings")
        return list(found)

    def patterns(self, key: str) -> list[str]:
        """Names, and regular expressions after ``re:``."""
        for text in (found := self.texts(key)):
            try:
                re.compile(text.removeprefix("re:"))
            except re.error as error:
                raise self._wrong(key, text, f"a regular expression after re: ({error})") from None
        return found

    def section(self, key: str) -> Values:
        """An object inside of this one; empty if it is missing."""
        found = self.found.get(key)
        return Values({} if found is None else found, self.file, f"{self._path}.{key}")

    def sections(self, key: str) -> dict[str, Values]:
        """The objects inside of an object inside of this one."""
        inner = self.section(key)
        return {name: inner.section(name) for name in inner.found}

    def _first(self, keys: tuple[str, ...]) -> tuple[str, Any]:
        there = [key for key in keys if self.found.get(key) is not None]
        return (there[0], self.found[there[0]]) if there else (keys[0], None)

    def _wrong(self, key: str | None, found: Any, wanted: str) -> KTModelError:
        path = self._path if key is None else f"{self._path}.{key}"
        shown = json.dumps(found, default=str, ensure_ascii=False)
        shown = shown if len(shown) <= 80 else f"{shown[:77]}..."
        return KTModelError(
            f"{self.file}: {path} is {shown}, wanted {wanted}. Restore the file from where the checkpoint was published, or use the "
            "model's unquantized checkpoint."
        )
