"""Many chats in one process: memory stays flat, and the last greedy answers equal the first ones.

LLAMAFACTORY_KT_SOAK_TURNS sets the length; see CONTRIBUTING. Measurements are printed; pytest shows them with -rP.
"""

from __future__ import annotations

import asyncio
import functools
import gc
import os
import subprocess
import sys
import weakref
from collections.abc import Callable

import numpy as np
import psutil
import pytest
import torch
from helpers.adapters import make_adapter
from helpers.chats import EXPECTED
from helpers.marks import KERNEL_PROBLEM
from helpers.models import make_model

from llamafactory_kt import switch_adapter
from llamafactory_kt.ground.paging import give_back_memory
from llamafactory_kt.model.state import kt_state

ENGINE = "torch" if KERNEL_PROBLEM else "AMXBF16"
TURNS = int(os.environ.get("LLAMAFACTORY_KT_SOAK_TURNS", "1000"))
SAMPLES = 24
ALONE = "LLAMAFACTORY_KT_SOAK_ALONE"
"""set in the process that :func:`alone` starts"""
NOISE = 8 * 2**20
"""bytes; two runs of about 1000 turns grew by 1 and by 3 MiB"""


def alone(test: Callable[..., None]) -> Callable[..., None]:
    """Run a test in a process of its own: what other tests have left in memory, and still free or take, is not its growth."""

    @functools.wraps(test)
    def run(*args, **kwargs):
        if ALONE in os.environ:
            return test(*args, **kwargs)
        command = [sys.executable, "-m", "pytest", "-q", "-rP", f"{__file__}::{test.__name__}"]
        done = subprocess.run(command, env=os.environ | {ALONE: "1"}, capture_output=True, text=True)
        assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
        print(done.stdout)

    return run


def slope(step: Callable[[int], None], steps: int) -> float:
    """The growth of resident memory per step: least squares over samples, without the first quarter, in which caches
    and the allocator's arenas fill."""
    process, points = psutil.Process(), []
    for number in range(steps):
        step(number)
        if number >= steps // 4 and number % max(1, steps // SAMPLES) == 0:
            gc.collect()
            give_back_memory()
            points.append((number, process.memory_info().rss))
    grown = float(np.polyfit(*np.array(points, dtype=float).T, 1)[0])
    print(f"{steps} steps, {len(points)} samples, resident {points[0][1] / 2**20:.0f} to {points[-1][1] / 2**20:.0f} MiB, "
          f"slope {grown:+.0f} bytes a step")  # fmt: skip
    return grown


def chat_model(model, adapter, **keys):
    from llamafactory.chat import ChatModel

    return ChatModel(
        {"model_name_or_path": str(model), "adapter_name_or_path": str(adapter), "template": "deepseek", "use_kt": True,
         "kt_backend": ENGINE, "do_sample": False, **keys}
    )  # fmt: skip


def leave(chat) -> None:
    """End LLaMA-Factory's threads, which never end by themselves; a call that one of them has just finished still holds
    the model."""
    asyncio.run_coroutine_threadsafe(chat._loop.shutdown_default_executor(), chat._loop).result()
    chat._loop.call_soon_threadsafe(chat._loop.stop)
    chat._thread.join()
    chat._loop.close()


@torch.inference_mode()
def cache_bytes(model, tokens: int) -> int:
    """The key-value cache of a conversation: what a turn takes, and what it would leave behind if something kept it."""
    cache = model(input_ids=torch.arange(tokens)[None], use_cache=True).past_key_values
    return sum(tensor.nbytes for layer in cache.layers for tensor in (layer.keys, layer.values))


def test_thousands_of_turns(demo):
    """Whole and streamed answers, with and without the adapter, which is switched every 50 turns."""
    chat, questions = chat_model(demo / "model", demo / "adapter"), [*EXPECTED]
    model = chat.engine.model

    def ask(question: str, **keys) -> str:
        return chat.chat([{"role": "user", "content": question}], **keys)[0].response_text

    before = [ask(question) for question in questions[:8]]
    assert before == [EXPECTED[question]["adapter"] for question in questions[:8]]

    def turn(number: int) -> None:
        messages = [{"role": "user", "content": questions[number % len(questions)]}]
        if number % 2:
            assert list(chat.stream_chat(messages, max_new_tokens=2))
        else:
            assert chat.chat(messages, max_new_tokens=2)[0].response_length == 2
        if number % 50 == 49:
            switch_adapter(model, None if number % 100 == 49 else demo / "adapter")

    grown = slope(turn, TURNS)
    # a turn reads 16 tokens at least: a tenth of their cache, and once the steps that allocator and thread stacks take.
    # A short run so sees whole caches that are kept, a long one a tenth of them.
    assert grown * TURNS < cache_bytes(model, 16) / 10 * TURNS + NOISE
    switch_adapter(model, demo / "adapter")
    assert [ask(question) for question in questions[:8]] == before


@alone
def test_loads_and_switches(tmp_path):
    """The experts are most of this model; kt-kernel itself does not free them."""
    model = make_model(
        tmp_path / "model", "deepseek_v2", moe_intermediate_size=8192, hidden_size=256, num_hidden_layers=2
    )
    adapters = [make_adapter(tmp_path / name, model, rank=16, seed=seed) for seed, name in enumerate("ab")]
    answers, sizes = set(), set()

    def cycle(number: int) -> None:
        chat = chat_model(model, adapters[0])
        sizes.add(sum(wrapper.engine.nbytes for wrapper in kt_state(chat.engine.model).wrappers))
        said = []
        for adapter in (adapters[0], adapters[1], None, adapters):
            switch_adapter(chat.engine.model, adapter)
            said.append(chat.chat([{"role": "user", "content": "one"}], max_new_tokens=8)[0].response_text)
        answers.add(tuple(said))
        leave(chat)

    grown = slope(cycle, max(8, TURNS // 100))
    assert len(answers) == 1 and len(set(*answers)) == 4, "the same four answers every time"
    (experts,) = sizes
    assert experts > 48 * 2**20 and grown < experts / 4, "a quarter of what a load would leak"


@pytest.mark.parametrize("keys", [{}, {"kt_merge_adapter": True}])
def test_a_model_is_freed_when_the_last_reference_goes(demo, keys):
    """Not only with a later garbage collection: another load may need the memory."""
    gc.collect()
    gc.disable()
    try:
        chat = chat_model(demo / "model", demo / "adapter", **keys)
        assert chat.chat([{"role": "user", "content": "one"}], max_new_tokens=2)
        model = chat.engine.model
        freed = [weakref.ref(part) for part in (model, *(wrapper.engine for wrapper in kt_state(model).wrappers))]
        leave(chat)
        del chat, model
        assert [part() for part in freed] == [None] * len(freed)
    finally:
        gc.enable()


if __name__ == "__main__":
    pytest.main([__file__, "-q", "-rP"])
