"""The table of docs/architectures.md: every architecture in float32, against stock transformers."""

from __future__ import annotations

import pytest
from helpers import architectures
from packaging.version import Version
from transformers import __version__


@pytest.mark.parametrize("page", architectures.PAGES, ids=lambda page: page.stem)
def test_every_architecture_has_a_row(page):
    assert sorted(architectures.rows(page)) == sorted(architectures.TINY), "make architectures writes the table"


@pytest.mark.parametrize("name", architectures.TINY)
def test_rows_say_what_is_computed_exactly(tmp_path, name):
    rows = {architectures.rows(page)[name] for page in architectures.PAGES}
    [row] = rows
    if Version(row.transformers) > Version(__version__):
        pytest.skip(f"transformers {__version__} does not have {name} in a form that is accepted")
    found, error, effect = architectures.errors(architectures.tiny_model(name), tmp_path)
    assert (found.formula, found.engines) == (row.formula, row.engines), "make architectures writes the table"
    assert error < architectures.EXACT
    assert effect > architectures.EFFECT
