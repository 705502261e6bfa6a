"""One line of a diagnosis."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from importlib import metadata


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


DISTRIBUTION = "llamafactory-kt-experts"


def see(page: str) -> str:
    """A sentence with the address of a page of the documentation, by the addresses in the installed package's metadata; empty where it has
    none: a wheel holds no pages."""
    try:
        urls = [line.partition(", ") for line in metadata.metadata(DISTRIBUTION).get_all("Project-URL") or ()]
    except metadata.PackageNotFoundError:
        return ""
    address = next((address for label, _, address in urls if label.lower() in ("documentation", "docs")), None)
    return f" See {address.rstrip('/')}/{page}." if address else ""
