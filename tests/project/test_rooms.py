"""The picture of the rooms in docs/how-it-is-built.md is the code's: read from the imports, those within functions included."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

import pytest
from helpers.places import ROOT

PACKAGE = ROOT / "llamafactory_kt"
PAGES = [ROOT / "docs" / "how-it-is-built.md", ROOT / "docs" / "how-it-is-built_zh.md"]
TOP = {"__init__", "__main__", "_version", "convert_moe_lora"}
"""files beside the rooms: the public names, the seeds of a command, and the version"""
KNOWS_LLAMA_FACTORY = {"integration", "training"}


def module_of(file: Path) -> str:
    return ".".join(file.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_of(file): file for file in PACKAGE.rglob("*.py")}


def room_of(module: str) -> str:
    return module.partition(".")[0]


def imports(module: str) -> set[str]:
    """What a module imports: our own modules by their names here, others by their first word with a leading colon."""
    file = MODULES[module]
    package = module.split(".") if file.name == "__init__.py" else module.split(".")[:-1]
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            parts = package[: len(package) - node.level + 1] + (node.module.split(".") if node.module else [])
            for alias in node.names:
                name = ".".join([*parts, alias.name])
                found.add(name if name in MODULES else ".".join(parts))
        elif isinstance(node, ast.ImportFrom):
            found.add(f":{node.module.partition('.')[0]}")
        elif isinstance(node, ast.Import):
            found |= {f":{alias.name.partition('.')[0]}" for alias in node.names}
    return found


@cache
def every_import() -> dict[str, set[str]]:
    return {module: imports(module) for module in MODULES}


def rooms(page: Path) -> dict[str, set[str]]:
    """The table: room -> rooms that it uses, in the table's order, which is top to bottom."""
    found = {}
    for line in page.read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if len(cells) == 3 and (name := re.fullmatch(r"`(\w+)(?:/|\.py)`", cells[0])):
            found[name[1]] = {room for room, _ in re.findall(r"`(\w+)(/|\.py)`", cells[2])}
    return found


def used() -> dict[str, set[str]]:
    """room -> rooms that its modules import."""
    found: dict[str, set[str]] = {}
    for module, targets in every_import().items():
        if (room := room_of(module)) not in TOP:
            others = {room_of(target) for target in targets if not target.startswith(":")} - {room, *TOP, ""}
            found.setdefault(room, set()).update(others)
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_table_is_true(page):
    table, found = rooms(page), used()
    assert set(table) == set(found)
    for room, others in found.items():
        assert table[room] == others, f"{room}: the imports say {sorted(others)}"


def test_imports_go_downwards():
    order = list(rooms(PAGES[0]))
    wrong = [f"{room} -> {other}" for room, others in used().items() for other in others
             if order.index(other) <= order.index(room)]  # fmt: skip
    assert not wrong


def test_no_circles():
    """Also within a room, file by file."""
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join([*path[path.index(module) :], module])
        if module not in done:
            for target in sorted(every_import()[module] & set(MODULES)):
                visit(target, (*path, module))
            done.add(module)

    for module in MODULES:
        visit(module, ())


def test_only_the_integration_knows_llama_factory():
    knowing = {room_of(module) for module, targets in every_import().items() if ":llamafactory" in targets}
    assert knowing and knowing <= KNOWS_LLAMA_FACTORY


def test_rooms_are_small():
    """A folder that holds more has more than one concept."""
    for folder in {file.parent for file in MODULES.values()}:
        assert len(list(folder.glob("*.py"))) <= 17, folder


def test_nobody_compares_names_of_engines():
    """Outside engines/, only the keys' help and SGLang's own names of formats spell one."""
    from llamafactory_kt.engines.registry import engines

    names = {alias for engine in engines() for alias in (engine.name, *engine.aliases)} - {"torch"}  # the package, too
    found = {
        module
        for module, file in MODULES.items()
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.Constant) and node.value in names and room_of(module) != "engines"
    }
    assert found == {"settings.sglang_methods"}
