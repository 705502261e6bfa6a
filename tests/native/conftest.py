from __future__ import annotations

from pathlib import Path

import pytest
from helpers.native import EMULATED_TILES

from llamafactory_kt.native import build, library


@pytest.fixture(scope="session")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A library with the set ``amx`` for CPUs that lack nothing but the tiles."""
    found = library.library()
    if isinstance(found, str) or b"avx512bf16" not in found.kt_instruction_sets():
        pytest.skip("this CPU has no AVX-512 BF16, which the kernels of AMX need, too")
    if not build.compilers():
        pytest.skip("there is no C++ compiler")
    target = tmp_path_factory.mktemp("emulated") / "libkt_native.so"
    sources = build.SOURCES.glob("*.cpp")
    problem = build.compile_files(build.compilers()[0], sources, target, ["-Og", EMULATED_TILES], ["-shared"])
    assert not problem, problem
    return target
