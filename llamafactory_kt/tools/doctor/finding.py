"""One line of a diagnosis."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum


class Status(StrEnum):
    """How a finding bears on a chat with KT experts."""

    OK = "ok"
    WARNING = "warning"
    """works, but not as well as it could, or not as was meant"""
    ERROR = "error"
    """does not work"""


@dataclass(frozen=True)
class Finding:
    """What one check found."""

    subject: str
    """what was looked at, a few words"""
    status: Status
    text: str
    """what was found, one line"""
    advice: str = ""
    """what to do; empty where all is well"""


Findings = Iterator[Finding]


def ok(subject: str, text: str) -> Finding:
    """All is well."""
    return Finding(subject, Status.OK, text)


def warning(subject: str, text: str, advice: str) -> Finding:
    """Works, but."""
    return Finding(subject, Status.WARNING, text, advice)


def error(subject: str, text: str, advice: str) -> Finding:
    """Does not work."""
    return Finding(subject, Status.ERROR, text, advice)
