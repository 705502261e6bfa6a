"""What is freed while a model generates is there for the next tensor, and goes back to the system afterwards."""

from __future__ import annotations

import gc
import resource

import psutil
import pytest
import torch

from llamafactory_kt.used_memory import keeping_freed_memory

SIZE = 48 * 2**20  # more than glibc keeps by itself
PAGES = SIZE // resource.getpagesize()


def faults() -> int:
    """Pages that the system had to clear for a tensor."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.empty(SIZE, dtype=torch.uint8).fill_(1)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def resident() -> int:
    gc.collect()
    return psutil.Process().memory_info().rss


def test_memory_is_kept_until_the_last_one_is_done():
    """The least of several: a small block may land in a large free one, and the next large one go elsewhere."""
    if min(faults() for _ in range(5)) < PAGES * 0.9:
        pytest.skip("this C library keeps freed memory of this size anyway")
    with keeping_freed_memory():
        with pytest.raises(ValueError, match="an answer that fails"), keeping_freed_memory():
            assert min(faults() for _ in range(5)) < PAGES * 0.1
            raise ValueError("an answer that fails")
        assert min(faults() for _ in range(5)) < PAGES * 0.1
        kept = resident()
    assert kept - resident() > SIZE * 0.9
    assert faults() > PAGES * 0.9
