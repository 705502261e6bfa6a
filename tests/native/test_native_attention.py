"""Attention of the native kernels against float64 sums, row by row: each instruction set that this CPU has, one query to hundreds."""

from __future__ import annotations

from ctypes import byref

import pytest
import torch

from llamafactory_kt.native import calls
from llamafactory_kt.native.coded_rows import CodedRows, decode, encode
from llamafactory_kt.native.library import AttentionCall, library

LIBRARY = library()
SETS = [] if isinstance(LIBRARY, str) else LIBRARY.kt_instruction_sets().decode().split(",")
pytestmark = pytest.mark.skipif(not SETS, reason=str(LIBRARY))
BOUND = {torch.float32: 3e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}
"""of the weighted values' norm: float32 sums; bf16 rounds weights and result, by 2^-8 each at most"""


@pytest.fixture(params=SETS)
def instructions(request):
    LIBRARY.kt_use(request.param.encode())
    yield request.param
    LIBRARY.kt_use(None)


# batch, heads, kv_heads, queries, keys, key_dim, value_dim, window, sinks, mask
SIZES = [
    (1, 8, 2, 1, 1, 64, 64, 0, False, False), (1, 32, 4, 1, 1000, 128, 128, 0, False, False),
    (2, 8, 8, 3, 300, 96, 40, 0, True, True), (1, 12, 3, 5, 777, 24, 7, 100, True, False),
    (2, 16, 1, 1, 513, 576, 512, 0, False, True), (1, 4, 2, 4, 4, 16, 16, 0, False, False),
    (1, 5, 1, 1, 600, 80, 80, 300, True, False), (3, 7, 1, 1, 70, 33, 1, 0, False, True),
    (1, 6, 2, 70, 700, 80, 80, 0, False, False), (1, 6, 2, 33, 33, 192, 128, 0, True, False),
    (2, 8, 1, 17, 200, 256, 256, 50, False, True), (1, 32, 4, 40, 40, 64, 64, 0, False, False),
    (1, 64, 8, 9, 600, 64, 64, 128, True, False), (2, 5, 5, 70, 129, 96, 96, 7, True, True),
    (1, 48, 1, 3, 4500, 40, 24, 0, True, True), (2, 2, 1, 300, 301, 31, 17, 1, False, False),
]  # fmt: skip


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_attention(instructions, sizes):
    batch, heads, kv_heads, queries, keys, key_dim, value_dim, window, sinks, mask = sizes
    generator = torch.Generator().manual_seed(keys)

    def random(*shape):
        return torch.randn(*shape, generator=generator)

    for dtype, heads_first in (
        (torch.float32, True),
        (torch.bfloat16, True),
        (torch.bfloat16, False),
        (torch.float16, False),
    ):
        q = random(batch, queries, heads, key_dim).to(dtype).transpose(1, 2)
        k, v = (grown(random, batch, kv_heads, keys, width, heads_first).to(dtype) for width in (key_dim, value_dim))
        logits = random(heads) if sinks else None
        seen = random(batch, keys) > -0.5 if mask else None
        if seen is not None:
            seen[-1, : keys - queries // 2] = False  # left padding: some queries see nothing
        given = q, k, v, key_dim**-0.5, window, logits, seen
        found = calls.attention(*given, threads=3)
        wanted, size = attention_by_sums(*given), attention_by_sums(q, k, v.abs(), *given[3:]).norm(dim=-1)
        error = (found.double() - wanted).norm(dim=-1)
        assert (error <= BOUND[dtype] * size).all(), f"{dtype}: {(error / size).max():.1e} of a row"
        for threads in (1, 2):
            assert torch.equal(found, calls.attention(*given, threads=threads)), "the number of threads must not matter"


BOUND_OF_CODES = {**BOUND, torch.float32: 1e-4}
"""queries and the softmax's weights are shorts, each relative to the largest one of a row"""


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_attention_to_codes(instructions, sizes):
    """Against float64 sums of what the codes stand for."""
    batch, heads, kv_heads, queries, keys, key_dim, value_dim, window, sinks, mask = sizes
    generator = torch.Generator().manual_seed(keys)

    def random(*shape):
        return torch.randn(*shape, generator=generator)

    logits = random(heads) if sinks else None
    seen = random(batch, keys) > -0.5 if mask else None
    for dtype in BOUND:
        q = random(batch, queries, heads, key_dim).to(dtype).transpose(1, 2)
        coded, plain = [], []
        for width in (key_dim, value_dim):
            rows = encode(random(batch, kv_heads, keys + 5, width).to(dtype))[:, :, 3 : keys + 3]
            coded.append(CodedRows(rows, width, dtype))
            plain.append(decode(rows, width, torch.float32))
        rest = key_dim**-0.5, window, logits, seen
        found = calls.attention(q, *coded, *rest, threads=3)
        wanted = attention_by_sums(q, *plain, *rest)
        size = attention_by_sums(q, plain[0], plain[1].abs(), *rest).norm(dim=-1)
        error = (found.double() - wanted).norm(dim=-1)
        assert (error <= BOUND_OF_CODES[dtype] * size).all(), f"{dtype}: {(error / size).max():.1e} of a row"
        assert torch.equal(found, calls.attention(q, *coded, *rest, threads=1)), "the number of threads must not matter"


def test_codes(instructions):
    """Against torch's rounding; a row that is not finite is none of the others' concern."""
    for width in (1, 6, 32, 77, 300):
        states = (
            torch.randn(2, 5, 70, 3 * width)[..., :width].transpose(1, 2) * torch.logspace(-6, 6, 70)[:, None, None]
        )
        states[0, 2] = 0
        rows, states[1, 3, 1, 0] = None, torch.inf
        rows = encode(states)
        assert rows.shape == (2, 70, 5, -(-width // 4) + 1)
        scales = states.abs().amax(-1, keepdim=True) / 127
        found = decode(rows, width, torch.float32)
        assert found[1, 3, 1].isnan().all() and found.isnan().sum() == width
        assert not found[0, 2].any()
        wanted = ((states / scales).round() * scales).nan_to_num(0)
        assert (
            (found.nan_to_num(0) - wanted).abs() <= 1e-5 * scales.nan_to_num(0, 0, 0)
        ).double().mean() > 0.999  # but for ties
        assert ((found - states).nan_to_num(0).abs() <= 0.5001 * scales).all()
        for dtype in (torch.bfloat16, torch.float16):
            narrow = torch.randn(1, 2, 3, width).to(dtype)
            assert torch.equal(encode(narrow), encode(narrow.float()))


@pytest.mark.parametrize("queries", [1, 60])
def test_nan_among_codes_is_seen(instructions, queries):
    q, k, v = (torch.randn(1, 2, queries, 64) for _ in range(3))
    k[0, 1, queries // 2] = torch.nan
    found = calls.attention(q, *(CodedRows(encode(t), 64, t.dtype) for t in (k, v)), 0.1, threads=1).isnan().any(-1)[0]
    assert not found[:, 0].any() and found[queries // 2 :, 1].all() and not found[: queries // 2, 1].any()


@pytest.mark.parametrize("queries", [1, 3, 60])
def test_a_query_of_zeros_sees_all_keys_alike(instructions, queries):
    """As of a token that fills up a batch, and whose embedding is zeros; some keys are hidden."""
    keys, q = 300, torch.zeros(1, 2, queries, 64)
    k, v = torch.randn(1, 2, keys, 64), torch.randn(1, 2, keys, 64)
    seen = torch.rand(1, keys) < 0.5
    coded = [CodedRows(encode(t), 64, t.dtype) for t in (k, v)]
    for given in ((q, k, v), (q, *coded)):
        found = calls.attention(*given, 0.1, mask=seen, threads=1)
        wanted = attention_by_sums(q, k, v, 0.1, 0, None, seen)
        assert (found - wanted).abs().max() < 1e-2  # of codes


def test_other_operators_get_the_values():
    states = torch.randn(2, 3, 9, 30).bfloat16()
    rows = encode(states)
    coded, plain = CodedRows(rows, 30, states.dtype), decode(rows, 30, states.dtype)
    assert (coded.shape, coded.dtype, coded.stride()) == (plain.shape, plain.dtype, plain.stride())
    assert torch.equal(coded.transpose(2, 3), plain.transpose(2, 3)) and torch.equal(coded[:, 1:] * 2, plain[:, 1:] * 2)
    query = torch.randn(2, 3, 4, 30).bfloat16()
    with torch.inference_mode():
        both = [torch.nn.functional.scaled_dot_product_attention(query, k, k) for k in (coded, plain)]
        assert torch.equal(*both)
    assert isinstance(coded.detach(), CodedRows)
    mixed, wanted = (calls.attention(query, coded, values, 0.2, threads=1) for values in (plain, plain.clone()))
    assert torch.equal(mixed, wanted)


def grown(random, batch, kv_heads, keys, width, heads_first):
    """Keys or values of a cache with room for more; rows may lie apart."""
    if heads_first:
        return random(batch, kv_heads, keys + 50, width)[:, :, :keys]
    return random(batch, keys + 3, kv_heads, width + 5)[:, :keys, :, :width].transpose(1, 2)


def attention_by_sums(q, k, v, scale, window, sinks, seen):
    """[batch, queries, heads, value_dim], float64."""
    group, queries, keys = q.shape[1] // k.shape[1], q.shape[2], k.shape[2]
    k, v = (t.double().repeat_interleave(group, 1) for t in (k, v))
    scores = q.double() @ k.transpose(2, 3) * scale
    position, key = torch.arange(keys - queries, keys)[:, None], torch.arange(keys)
    visible = (key <= position) & (key > position - (window or keys + 1))
    if seen is not None:
        visible = visible & seen[:, None, None]
    scores = scores.masked_fill(~visible, -torch.inf)
    if sinks is not None:
        scores = torch.cat([scores, sinks.double()[None, :, None, None].expand(*scores.shape[:3], 1)], -1)
    weights = scores.softmax(-1).nan_to_num(0)  # a row that sees nothing
    return (weights[..., :keys] @ v).transpose(1, 2)


def test_nan_is_seen(instructions):
    for queries in (1, 60):
        q, k, v = (torch.randn(1, 2, queries, 64) for _ in range(3))
        k[0, 1, queries // 2] = torch.nan
        found = calls.attention(q, k, v, 0.1, threads=1).isnan().any(-1)[0]
        assert not found[:, 0].any() and found[queries // 2 :, 1].all() and not found[: queries // 2, 1].any()


def test_memory_does_not_grow_with_queries(instructions):
    def memory(queries):
        call = AttentionCall(
            batch=1, heads=32, kv_heads=4, queries=queries, keys=queries, key_dim=128, value_dim=128, dtype=1, scale=0.1
        )
        return LIBRARY.kt_attention_scratch(byref(call), 2)

    assert memory(100_000) == memory(1000)
    assert memory(1000) < 4 << 20
