"""The table of LLaMA-Factory's versions is that of the installed one, and what it does not know stays stock."""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import version
from types import ModuleType

import pytest
from helpers.interpreters import python
from packaging.version import Version

from llamafactory_kt import KTHookError
from llamafactory_kt.integration import known_versions
from llamafactory_kt.integration.known_versions import MAIN, RELEASE, TABLE, VERSIONS, Row
from llamafactory_kt.integration.patching import expect, versions

INSTALLED = RELEASE if Version(version("llamafactory")) < Version(MAIN) else MAIN


def test_the_rows_of_the_installed_version():
    """In an interpreter without the hooks, since those replace what the table describes."""
    functions = {row.function: row.parameters for row in TABLE if INSTALLED in row.versions}
    assert functions.keys() == {row.function for row in TABLE}, "every function has a row for each version"
    result = python(
        f"""
    import inspect
    from importlib import import_module
    for function, parameters in {functions!r}.items():
        owner, name = function.rsplit(".", 1)
        try:
            owner = import_module("llamafactory." + owner)
        except ModuleNotFoundError:
            module, kind = owner.rsplit(".", 1)
            owner = getattr(import_module("llamafactory." + module), kind)
        found = getattr(owner, name, None)
        found = None if found is None else " ".join(inspect.signature(found).parameters)
        print(function, "right" if found == parameters else f"has {{found}}")
    """,
        LLAMAFACTORY_KT_DISABLE="1",
    )
    lines = [line.split(" ", 1) for line in result.stdout.splitlines() if line.split(" ")[0] in functions]
    said = dict(lines)
    for function in functions:  # the engine for SGLang can only be imported with SGLang
        assert said.get(function, "right" if "sglang" in function else result.stderr[-2000:]) == "right", function


def test_every_function_has_one_row_for_each_version():
    for function in {row.function for row in TABLE}:
        covered = [each for row in TABLE if row.function == function for each in row.versions]
        assert sorted(covered) == sorted(VERSIONS), function


def stranger() -> ModuleType:
    module = ModuleType("llamafactory.webui.example")
    module.load = lambda data, something_new: None
    return module


def test_a_function_that_matches_no_row(monkeypatch):
    table = (Row("webui.example.load", "data", (RELEASE,)), Row("webui.example.load", "data lang", (MAIN,)))
    monkeypatch.setattr(known_versions, "TABLE", table)
    with pytest.raises(KTHookError) as error:
        expect(stranger(), "load")
    assert str(error.value) == (
        "llamafactory.webui.example.load cannot be hooked: found (data, something_new), expected (data) of 0.9.5 or "
        f"(data, lang) of 0.9.6.dev0. pip install llamafactory==0.9.5. Installed: {versions()}."
    )


def test_a_function_that_one_version_does_not_have(monkeypatch):
    table = (Row("webui.example.missing", None, (RELEASE,)), Row("webui.example.missing", "data", (MAIN,)))
    monkeypatch.setattr(known_versions, "TABLE", table)
    assert expect(stranger(), "missing") is None
    monkeypatch.setattr(known_versions, "TABLE", table[1:])
    with pytest.raises(KTHookError, match=r"found nothing of that name, expected \(data\) of 0\.9\.6\.dev0"):
        expect(stranger(), "missing")


def test_all_hooks_are_applied():
    for name in ("hparams.parser", "chat.chat_model", "api.app", "webui.interface"):
        import_module(f"llamafactory.{name}")
    from llamafactory_kt.integration import bootstrap

    assert not bootstrap.failures
