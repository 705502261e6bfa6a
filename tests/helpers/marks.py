"""What a test needs of this machine. Where that is missing, the test is skipped and says why."""

from __future__ import annotations

import pytest

from llamafactory_kt.engines.registry import get_engine


def needs(engine: str) -> pytest.MarkDecorator:
    problem = get_engine(engine).problem()
    return pytest.mark.skipif(problem is not None, reason=str(problem))


KERNEL_PROBLEM = get_engine("AMXBF16").problem()
needs_kernel = needs("AMXBF16")
needs_base_kernel = needs("AVX2BF16")
needs_onednn = needs("oneDNN")
needs_native = needs("native")
ENGINES = [
    pytest.param("AMXBF16", marks=needs_kernel), pytest.param("native", marks=needs_native), pytest.param("oneDNN", marks=needs_onednn), "torch",
]  # fmt: skip
FASTEST = "torch" if KERNEL_PROBLEM else "AMXBF16"
"""the engine of tests that take one, whichever can run"""
