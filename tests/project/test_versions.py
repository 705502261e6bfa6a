"""The versions that were tested: the results, the tables in the docs, and the ranges that follow from them."""

from __future__ import annotations

import json
import tomllib

import pytest
import yaml
from helpers.places import ROOT
from matrix.run import PAGES, RESULTS, ROWS, table
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import Version

from llamafactory_kt import __version__
from llamafactory_kt.ground.internals import TESTED

FOUND = json.loads(RESULTS.read_text())


def run_with(library: str) -> set[Version]:
    return {Version(result["versions"][library]) for result in FOUND.values()}


def test_every_row_was_right():
    rows = [line for line in ROWS.read_text().splitlines() if line and not line.startswith("#")]
    assert set(FOUND) == set(rows), "make test MATRIX=all runs them"
    assert [row for row, result in FOUND.items() if result["wrong"] or result["right"] < 12] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_tables_are_the_results(page):
    assert table(PAGES[page]) in page.read_text(encoding="utf-8"), "run tests/matrix/run.py"


@pytest.mark.parametrize("library", TESTED)
def test_ranges_end_where_the_results_do(library):
    """Their first and last minor versions were run, and pip resolves nothing else."""
    versions = sorted(run_with(library))
    tested = SpecifierSet(TESTED[library])
    assert all(version in tested for version in versions)
    newest = versions[-1]
    assert (
        f"{newest.major}.{newest.minor + 1}" not in tested
        and f"{versions[0].major}.{versions[0].minor - 1}.99" not in tested
    )
    requirements = map(Requirement, tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"])
    asked = next(requirement.specifier for requirement in requirements if requirement.name == library)
    assert all(str(newest) in tested for newest in versions if newest in asked)
    assert {bound.version for bound in asked} <= {bound.version for bound in tested} | {"5.6.0", "2.9.1", "2.11"}


def test_the_citation_names_this_version():
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == __version__
