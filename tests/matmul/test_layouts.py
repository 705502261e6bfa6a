"""Which sizes of weights are packed: those that were measured to be faster.

The clock is replaced, and what this process remembers is forgotten as in a new process. Both are private.
"""

from __future__ import annotations

import json

import pytest
import torch
from helpers.packing import PACKED, pack_as

from llamafactory_kt.matmul import layouts
from llamafactory_kt.matmul.layouts import is_packed, unpack

TURNS = 1 + layouts._TURNS
SAMPLES = {size: [torch.ones(size, dtype=torch.bfloat16) for _ in range(2)] for size in [(64, 64), (128, 64), (32, 64)]}


def faster(*sizes: layouts.Size) -> set[layouts.Size]:
    return layouts.faster_packed(sizes, lambda: SAMPLES)


@pytest.fixture(params=PACKED)
def timed(request, monkeypatch, tmp_path):
    """The weights whose products were timed. With 64 rows packed weights are faster, with 128 they are not, and every
    fifth time is wrong."""
    pack_as(monkeypatch, request.param)
    monkeypatch.setenv("LLAMAFACTORY_KT_CACHE", str(tmp_path))
    monkeypatch.setattr(layouts, "_known", {})
    monkeypatch.setattr(layouts, "SMALLEST", 2 * 64 * 64)
    called: list[tuple[int, ...]] = []

    def seconds(product, x, weight):
        plain = unpack(weight) if is_packed(weight) else weight
        called.append(tuple(plain.shape))
        product(x, weight)
        if not is_packed(weight):
            return 1.0
        return 9.0 if len(called) % 5 == 0 else {64: 0.9, 128: 1.1}[len(plain)]

    monkeypatch.setattr(layouts, "_seconds", seconds)
    return called


def test_sizes_that_are_faster_packed(timed):
    """By the median over all samples and turns. Each size is measured once, and small ones never."""
    assert faster(*SAMPLES) == {(64, 64)} | ({(32, 64)} if layouts.has_bfloat16_kernels() else set())
    assert set(timed) == {(64, 64), (128, 64)} and len(timed) == 2 * 2 * 2 * TURNS
    assert faster((128, 64)) == set() and len(timed) == 2 * 2 * 2 * TURNS


@pytest.mark.parametrize("damage", [None, "", "[]", '{"facts": 1, "measured": []}', "text"])
def test_measured_sizes_are_remembered(timed, damage, tmp_path, monkeypatch):
    """By later processes, along with those measured since, until they are to be forgotten or their file is damaged."""
    has_bfloat16_kernels = layouts.has_bfloat16_kernels()
    assert faster((64, 64)) == {(64, 64)}
    (file,) = (tmp_path / "calibration").iterdir()
    if damage is not None:
        content = json.loads(file.read_text())
        content["measured"][0][3] = damage
        file.write_text(json.dumps(content) if damage.isalpha() else damage)
    once = 2 * 2 * TURNS
    until_now = once if damage is None else 2 * once
    for sizes, more in [([(64, 64)], 0), ([*SAMPLES], once), ([*SAMPLES], 0)]:
        layouts._known.clear()
        assert (64, 64) in faster(*sizes)
        until_now += more
        assert len(timed) == until_now
    layouts.forget_measured()
    faster(*SAMPLES)
    assert len(timed) == until_now + 2 * once
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    faster(*SAMPLES)
    assert len(timed) == until_now + 4 * once, "with other threads"
    assert layouts._recalled()
    with monkeypatch.context() as switched:  # by ONEDNN_MAX_CPU_ISA
        switched.setattr(layouts, "has_bfloat16_kernels", lambda: not has_bfloat16_kernels)
        assert layouts._recalled() == {}, "those of another layout"
    layouts.forget_measured()
    assert not [*(tmp_path / "calibration").iterdir()]
