"""Every message that users can get is on the pages docs/messages.

Messages are found in the source: what a KTError (or an error of the API) is raised with, what is logged as a warning, and
the problems that the checks of keys collect. A page covers a message if it quotes, in backticks, a piece of it, with … or
an example where it differs. Pages in Chinese show users the row whose quote has most in common with an error.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.places import ROOT

PACKAGE = ROOT / "llamafactory_kt"
LETTERS = 10
"""that a quote and a message must have in common"""
HOLE = "\0"
"""stands for what is only known at run time"""
COLLECTING = "settings"
"""the room whose checks put problems into lists instead of raising each"""
RAISED = re.compile(r"KT\w+Error|BadRequest|HTTPException|NotFiniteError")


def text_of(node: ast.AST) -> str:
    """What an expression says: literals as they are, a hole for everything else."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else HOLE
    if isinstance(node, ast.JoinedStr):
        return "".join(text_of(value) if isinstance(value, ast.Constant) else HOLE for value in node.values)
    if isinstance(node, ast.BinOp):
        return text_of(node.left) + text_of(node.right)
    return HOLE


def messages(path: Path) -> dict[int, str]:
    """line -> message with holes."""
    found = {}
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        arguments: list[ast.expr] = []
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            if RAISED.fullmatch(ast.unparse(node.exc.func)):
                arguments = [*node.exc.args, *(keyword.value for keyword in node.exc.keywords)]
        elif isinstance(node, ast.Call) and is_warning(node, path):
            arguments = [with_holes(argument) for argument in node.args[:1]]
        texts = [text_of(argument) for argument in arguments]
        message = max(texts, key=lambda text: len(text.replace(HOLE, "")), default="")
        if len(re.findall(r"\w+", message.replace(HOLE, ""))) > 1:  # a prefix before another message says nothing
            found[node.lineno] = message
    return found


def is_warning(node: ast.Call, path: Path) -> bool:
    if not isinstance(node.func, ast.Attribute):
        return False
    return node.func.attr == "warning" or (path.parent.name == COLLECTING and node.func.attr == "append")


def with_holes(node: ast.expr) -> ast.expr:
    """``%s`` and ``%d`` of logging as holes."""
    return ast.Constant(re.sub(r"%[sdg]|%\.\df", HOLE, text_of(node)))


def quoted(page: Path) -> list[str]:
    return [" ".join(quote.split()) for quote in re.findall(r"`([^`\n]+)`", page.read_text(encoding="utf-8"))]


def is_covered(message: str, quotes: list[str]) -> bool:
    """
    >>> is_covered("layer \\0 has no \\0; the file is incomplete", ["…: layer … has no …"])
    True
    >>> is_covered("layer \\0 has no \\0; the file is incomplete", ["the file is incomplete"])
    True
    >>> is_covered("\\0: unknown value \\0, expected one of \\0", ["kt_load: unknown value …"])
    True
    >>> is_covered("layer \\0 has no \\0; the file is incomplete", ["…: layer … has two …"])
    False
    """
    said = parts_of(message, HOLE)
    return any(
        (in_order(quote_parts := parts_of(quote, "…"), " ".join(said)) and len(" ".join(quote_parts)) >= LETTERS)
        or any(in_order(run, quote) for run in runs(said))
        for quote in quotes
    )


def parts_of(text: str, hole: str) -> list[str]:
    return [part for part in (" ".join(part.split()).strip(" :.;,'") for part in text.split(hole)) if part]


def runs(parts: list[str]) -> Iterator[list[str]]:
    """Neighbours that say something together: a quote may fill the holes between them."""
    for start in range(len(parts)):
        for end in range(start + 1, len(parts) + 1):
            if len(" ".join(parts[start:end])) >= LETTERS:
                yield parts[start:end]


def in_order(parts: list[str], text: str) -> bool:
    return all(part in text for part in parts) and bool(re.search(".*".join(map(re.escape, parts)), text))


@pytest.mark.parametrize("name", ["messages.md", "messages_zh.md"])
def test_every_message_is_on_the_page(name):
    quotes = quoted(ROOT / "docs" / name)
    every = {(path, line): text for path in sorted(PACKAGE.rglob("*.py")) for line, text in messages(path).items()}
    assert len(every) > 200, "the collector has lost most of them"
    missing = [
        f"{path.relative_to(ROOT)}:{line}: {text.replace(HOLE, '…')}"
        for (path, line), text in every.items()
        if not is_covered(text, quotes)
    ]
    assert not missing, f"{len(missing)} messages are not quoted in docs/{name}:\n" + "\n".join(missing)


def test_every_class_is_on_the_page():
    from llamafactory_kt.ground import errors

    classes = {name for name in vars(errors) if re.fullmatch(r"KT\w+Error", name)}
    for name in ("messages.md", "messages_zh.md"):
        rows = re.findall(r"^\| `(KT\w+Error)` \|", (ROOT / "docs" / name).read_text(encoding="utf-8"), re.M)
        assert set(rows) == classes
