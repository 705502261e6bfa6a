from __future__ import annotations

import pytest
from helpers.packing import PACKED, pack_as, pretend_no_bfloat16_kernels

from llamafactory_kt.decoding import prepare
from llamafactory_kt.matmul import layouts


@pytest.fixture
def every_size(monkeypatch):
    """Prepare layers of any size, however small."""
    monkeypatch.setattr(prepare, "SMALLEST", 0)


@pytest.fixture
def all_packed(monkeypatch):
    """Pack every size that can be packed."""
    monkeypatch.setattr(prepare, "faster_packed", lambda sizes, sample: {s for s in sizes if layouts.fits(s)})


@pytest.fixture(params=[*PACKED, "plain", "no kernels"])
def kind(request, monkeypatch):
    """How weights are multiplied: packed, plain, or plain on a CPU without bfloat16 kernels."""
    if request.param in ("plain", "no kernels"):
        monkeypatch.setattr(prepare, "faster_packed", lambda sizes, sample: set())
    else:
        request.getfixturevalue("all_packed")
        pack_as(monkeypatch, request.param)
    if request.param == "no kernels":
        pretend_no_bfloat16_kernels(monkeypatch)
    return request.param
