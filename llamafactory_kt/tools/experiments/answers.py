"""The answer file of ``llamafactory-kt generate``: one line per answer, written batch by batch, so a killed run can continue."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...ground.atomic_output import check_file, replacing, writing
from ...ground.errors import KTDataError
from ...integration.prompts import Prompt
from .generating import Answer


class AnswerFile:
    """JSON lines ``{"index", "key", "prompt", "answer", ...}``; ``key`` is a hash of the prompt and the configuration.

    Raises:
        KTDataError: The file has answers to other prompts or by another configuration, or is no file of answers.
    """

    def __init__(self, path: Path, prompts: list[Prompt], config: Mapping[str, Any], overwrite: bool = False):
        self.path = path
        self._prompts = {prompt.index: prompt for prompt in prompts}
        self._keys = {prompt.index: _key(prompt, config) for prompt in prompts}
        self.lines: dict[int, dict[str, Any]] = {} if overwrite else self._read()
        """existing answers by index, without errors: these are tried again"""
        self._begun = False
        check_file(path)

    def _read(self) -> dict[int, dict[str, Any]]:
        if not self.path.is_file():
            return {}
        text = self.path.read_text(encoding="utf-8")
        kept = {}
        for number, line in enumerate(text.split("\n")[:-1], start=1):  # a line without an end is torn
            try:
                entry = json.loads(line)
                index, key = entry["index"], entry["key"]
            except (ValueError, TypeError, KeyError) as error:
                raise KTDataError(
                    f"{self.path}, line {number} is no answer of an earlier run ({error!r}); choose another --output, or "
                    "--overwrite."
                ) from error
            if self._keys.get(index) != key:
                raise KTDataError(
                    f"{self.path}, line {number} answers another prompt, or was made by another configuration; choose "
                    "another --output, or --overwrite."
                )
            if "answer" in entry:
                kept[index] = entry
        return kept

    def add(self, answers: list[Answer]) -> None:
        """Append a batch and flush it to disk. Before the first, what the file has of other answers and of torn lines goes."""
        if not self._begun:
            self.sort()
        lines = {answer.index: self._line(answer) for answer in answers}
        text = "".join(map(_dump, lines.values())).encode()
        with writing(self.path), self.path.open("ab", buffering=0) as file:
            before = file.tell()
            try:
                if (written := file.write(text)) != len(text):  # as far as the disk went
                    file.write(text[written:])
                os.fsync(file.fileno())
            except BaseException:
                file.truncate(before)
                raise
        self.lines |= lines

    def sort(self) -> None:
        """Rewrite the file in the order of the prompts."""
        self._begun = True
        with replacing(self.path) as temporary:
            temporary.write_text("".join(_dump(self.lines[index]) for index in sorted(self.lines)), encoding="utf-8")

    def _line(self, answer: Answer) -> dict[str, Any]:
        prompt = self._prompts[answer.index]
        line: dict[str, Any] = {"index": answer.index, "key": self._keys[answer.index]}
        if "id" in prompt.row:
            line["id"] = prompt.row["id"]
        if answer.error:
            return {**line, "error": answer.error}
        line |= {"prompt": prompt.text, "answer": answer.text}
        if prompt.reference:
            line["reference"] = prompt.reference
        return line | {
            "prompt_tokens": answer.prompt_tokens, "answer_tokens": answer.answer_tokens,
            "ms_per_token": round(answer.ms_per_token, 3), "finish_reason": answer.finish_reason,
        }  # fmt: skip


def _dump(line: dict[str, Any]) -> str:
    return json.dumps(line, ensure_ascii=False) + "\n"


def _key(prompt: Prompt, config: Mapping[str, Any]) -> str:
    text = json.dumps([dict(prompt.row), dict(config)], sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
