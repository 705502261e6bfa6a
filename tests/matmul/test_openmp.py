"""Teams of OpenMP threads that call Python."""

from __future__ import annotations

import ctypes
import threading

import pytest
import torch

from llamafactory_kt.matmul import openmp
from llamafactory_kt.matmul.libtorch import libtorch
from llamafactory_kt.matmul.openmp import in_team

THREADS = 2


def test_in_a_team():
    """Each thread makes one call, in inference mode, and computes its products alone."""
    before = torch.get_num_threads()
    seen, meet = set(), threading.Barrier(THREADS, timeout=20)
    process = ctypes.CDLL(None)
    library = process if hasattr(process, "omp_in_parallel") else libtorch()

    def work():
        meet.wait()
        region = library.omp_in_parallel(), library.omp_get_num_threads()
        seen.add((threading.get_ident(), torch.is_inference_mode_enabled(), *region))

    in_team(work, THREADS)
    assert len(seen) == THREADS and {entry[1:] for entry in seen} == {(True, 1, THREADS)}
    assert threading.get_ident() in {entry[0] for entry in seen}
    assert not torch.is_inference_mode_enabled() and torch.get_num_threads() == before


def test_an_error_in_a_team_is_raised():
    def work():
        raise ValueError("in a thread of OpenMP's")

    with pytest.raises(ValueError, match="thread of OpenMP's"):
        in_team(work, THREADS)


def test_a_torch_without_libgomp(monkeypatch):
    monkeypatch.setattr(openmp, "_pytorch_openmp", object)
    calls: list[int] = []
    in_team(lambda: calls.append(threading.get_ident()), 8)
    assert calls == [threading.get_ident()]
