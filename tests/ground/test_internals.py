"""What reaches into other libraries is listed, switches itself off with other versions, and can be switched off."""

from __future__ import annotations

import importlib
import re
from importlib import metadata

import pytest
from helpers.places import ROOT

from llamafactory_kt import KTConfigError, KTExpertsConfig
from llamafactory_kt.ground.internals import NAMES, SWITCH, TESTED, Internal, switch_problem, untested
from llamafactory_kt.model.load_plan import LoadPlan

FILES = sorted(
    file for file in (ROOT / "llamafactory_kt").rglob("*.py") if re.search(r"^INTERNAL = ", file.read_text(), re.M)
)


def internal(file) -> Internal:
    return importlib.import_module(".".join(file.relative_to(ROOT).with_suffix("").parts)).INTERNAL


@pytest.mark.parametrize("page", ["how-it-is-built.md", "how-it-is-built_zh.md"])
def test_each_is_in_the_table(page):
    """With its file, its name for the switch, and its versions."""
    rows = (ROOT / "docs" / page).read_text(encoding="utf-8").splitlines()
    assert len(FILES) > 4
    for file in FILES:
        one = internal(file)
        path = str(file.relative_to(ROOT / "llamafactory_kt"))
        assert any(path in row and f"`{one.name}`" in row and f"{one.library} {one.versions}" in row for row in rows), (
            f"{path}: {one}"
        )


def test_the_names_differ():
    names = [internal(file).name for file in FILES]
    assert len(set(names)) == len(names) and "all" not in names
    assert set(names) == NAMES


def test_switching_off(monkeypatch):
    one = Internal("one", "torch", ">=2")
    assert (
        one.usable
        and not Internal("one", "torch", "<2").usable
        and not Internal("one", "no-such-library", ">=0").usable
    )
    for value, usable in (("one", False), ("other, one", False), ("all", False), ("other", True), ("", True)):
        monkeypatch.setenv(SWITCH, value)
        assert one.usable is usable, value


def test_essential_ones_are_tried_with_other_versions(monkeypatch):
    """Only what makes a model faster does nothing with them."""
    one = Internal("one", "torch", "<2", essential=True)
    assert one.usable and not one.tested
    assert not Internal("one", "no-such-library", ">=0", essential=True).usable
    monkeypatch.setenv(SWITCH, "one")
    assert not one.usable


def test_untested_versions(monkeypatch):
    assert untested() == []
    monkeypatch.setitem(TESTED, "torch", "<2")
    monkeypatch.setitem(TESTED, "no-such-library", "<2")
    assert untested() == [f"torch {metadata.version('torch')} (tested: <2)"]


def test_the_version_is_read_once(monkeypatch):
    """Reading it takes most of a millisecond, and layers ask for every token."""
    read = []
    monkeypatch.setattr(metadata, "version", lambda name: read.append(name) or "3.0")
    one = Internal("one", "a-library", ">=2")
    assert one.usable and one.usable and read == ["a-library"]


def test_names_that_nothing_has(monkeypatch):
    """A misspelt name would leave on what was meant to be off."""
    for value in ("", "all", "openmp, peft-lora"):
        monkeypatch.setenv(SWITCH, value)
        assert switch_problem() is None
    monkeypatch.setenv(SWITCH, "Openmp,typo")
    with pytest.raises(
        KTConfigError, match=r"unknown name 'Openmp', 'typo', expected some of auto-classes, .*, or all"
    ):
        LoadPlan(KTExpertsConfig(backend="torch"), None, [], on_gpu=False)
