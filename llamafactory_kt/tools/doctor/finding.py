"""One line of a diagnosis."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from functools import partial


class Status(StrEnum):
    """What a finding means for a chat with KT experts."""

    OK = "ok"
    WARNING = "warning"
    """works, but slower than it could, or not as intended"""
    ERROR = "error"
    """does not work"""


@dataclass(frozen=True)
class Finding:
    """The result of one check."""

    status: Status
    subject: str
    """what was checked, a few words"""
    text: str
    """what was found, one line"""
    advice: str = ""
    """what to do; empty if all is well"""


Findings = Iterator[Finding]

ok, warning, error = (partial(Finding, status) for status in Status)
