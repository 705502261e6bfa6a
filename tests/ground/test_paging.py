"""Pages of memory and of files, and what the system is told about them."""

from __future__ import annotations

import os
import re
import time
from pathlib import Path

import psutil
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from llamafactory_kt.ground.paging import drop_pages, in_huge_pages, prefetch_pages

MB = 2**20


@pytest.mark.skipif(not Path("/sys/kernel/mm/transparent_hugepage").is_dir(), reason="no large pages here")
def test_large_pages():
    memory = in_huge_pages(torch.empty(64 * MB, dtype=torch.uint8))
    flags: list[str] = []
    for mapping in re.split(r"(?m)^(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text())[1:]:
        first, last = (int(address, 16) for address in mapping.split()[0].split("-"))
        if first <= memory.data_ptr() + 32 * MB < last:
            flags = mapping.partition("VmFlags:")[2].split()
    assert "hg" in flags, "proc_pid_smaps(5): hugepage advise flag"


def test_pages_of_a_file_are_forgotten_and_read_again(tmp_path):
    values = torch.arange(8 * MB, dtype=torch.int32)
    save_file({"values": values}, tmp_path / "x.safetensors")
    with safe_open(tmp_path / "x.safetensors", framework="pt") as handle:
        mapped = handle.get_tensor("values")
        assert torch.equal(mapped, values)
        before = psutil.Process().memory_info().rss / MB
        drop_pages(mapped)
        assert before - psutil.Process().memory_info().rss / MB > 30
        assert torch.equal(mapped, values)


def test_pages_of_a_file_are_read_ahead(tmp_path):
    save_file({"values": torch.arange(8 * MB, dtype=torch.int32)}, tmp_path / "x.safetensors")
    with open(tmp_path / "x.safetensors", "rb") as file:

        def cached() -> bool:
            try:
                return os.preadv(file.fileno(), [bytearray(MB)], 16 * MB, os.RWF_NOWAIT) > 0
            except BlockingIOError:
                return False
            except OSError as error:
                pytest.skip(f"this file system does not say what it has in its cache: {error}")

        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        if cached():
            pytest.skip("this file system is its own cache")
        with safe_open(tmp_path / "x.safetensors", framework="pt") as handle:
            prefetch_pages(handle.get_tensor("values"))
        deadline = time.monotonic() + 120
        while not cached():
            assert time.monotonic() < deadline
            time.sleep(0.01)
