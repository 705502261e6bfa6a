"""Weights in column tiles: products compared with float64, and the weights restored bit for bit."""

from __future__ import annotations

import pytest
import torch

from llamafactory_kt.matmul import column_tiles

OUT, WIDTH, IN = 192, 64, 37


@pytest.fixture
def weight():
    return torch.randn(OUT, IN, generator=torch.Generator().manual_seed(1)).to(torch.bfloat16)


def stored(*rows: torch.Tensor) -> torch.Tensor:
    size = sum(map(len, rows)), rows[0].shape[1]
    return column_tiles.store(torch.full(column_tiles.layout(size), torch.nan, dtype=torch.bfloat16), rows)


@pytest.mark.parametrize("block", [1, 2 * WIDTH * IN, 2**20])
@pytest.mark.parametrize("divided", [(OUT,), (64, 128), (100, 92)], ids=str)
def test_stored_bit_by_bit(weight, block, divided, monkeypatch):
    """In blocks of one tile, of two, and of all; from one tensor, or from several that are whole tiles or are not."""
    monkeypatch.setattr(column_tiles, "BLOCK", block)
    weight[3, 5], weight[-1, -1], weight[70, 0] = torch.nan, torch.inf, -0.0
    found = stored(*weight.split(divided))
    assert found.shape == (3, IN, WIDTH) and torch.equal(found[1, 4], weight[64:128, 4])
    assert torch.equal(column_tiles.restore(found).view(torch.int16), weight.view(torch.int16))


@pytest.mark.parametrize("at_once", [1, 3 * IN, 2**22])
@pytest.mark.parametrize("rows", [0, 1, 2, 7])
def test_few_rows(weight, rows, at_once):
    """With more tiles than one call takes, and with fewer; rounded once."""
    x, held = torch.randn(rows, IN).to(torch.bfloat16), stored(weight)
    found = column_tiles.few_rows(x, held, column_tiles.counted(held), at_once)
    assert found.dtype == torch.bfloat16 and found.shape == (rows, OUT)
    torch.testing.assert_close(found.double(), x.double() @ weight.double().T, rtol=2**-8, atol=1e-5)


def test_numbers_grow(weight):
    """A larger weight after a smaller one, and the smaller one again."""
    large, x = torch.randn(2**15, IN).to(torch.bfloat16), torch.randn(1, IN).to(torch.bfloat16)
    for one in (weight, large, weight):
        found = column_tiles.few_rows(x, stored(one), column_tiles.counted(stored(one)))
        torch.testing.assert_close(found.double(), x.double() @ one.double().T, rtol=2**-8, atol=1e-5)


@pytest.mark.parametrize("block", [1, 2 * WIDTH * IN, 2**20])
@pytest.mark.parametrize("rows", [0, 1, 8, 11])
@pytest.mark.parametrize("many", [9, 512])
@pytest.mark.parametrize("threads", [1, 2])
def test_more_rows(weight, rows, many, block, threads):
    """As one wide product, or one for each tile; of all tiles at once, or some at a time."""
    x = torch.randn(rows, IN)
    found = column_tiles.more_rows(x, stored(weight), threads, block, many)
    assert found.dtype == torch.float32 and found.shape == (rows, OUT)
    torch.testing.assert_close(found.double(), x.double() @ weight.double().T, rtol=1e-5, atol=1e-5)
