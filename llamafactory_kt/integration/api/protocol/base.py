"""What all parts of a request share."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field


class Strict(BaseModel):
    """A number is no text, and a text no number."""

    model_config = ConfigDict(strict=True)


def _named(name: str) -> str:
    if not name.isprintable():
        raise ValueError("control characters in a name")
    return name


MOST_ITEMS = 2**16
"""of a list"""
# one error is enough: a list of a million wrong ones would hold up the server for minutes
LIST = Field(max_length=MOST_ITEMS, fail_fast=True)

Name = Annotated[str, Field(min_length=1, max_length=256), AfterValidator(_named)]
