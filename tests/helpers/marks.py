"""What a test needs of this machine. Where that is missing, the test is skipped and says why."""

from __future__ import annotations

import pytest

from llamafactory_kt.engines.registry import get_engine
from llamafactory_kt.matmul.mkldnn_ops import has_bfloat16_kernels


def needs(engine: str) -> pytest.MarkDecorator:
    problem = get_engine(engine).problem()
    return pytest.mark.skipif(problem is not None, reason=str(problem))


KERNEL_PROBLEM = get_engine("AMXBF16").problem()
needs_kernel = needs("AMXBF16")
needs_base_kernel = needs("AVX2BF16")
needs_onednn = needs("oneDNN")
needs_bfloat16_kernels = pytest.mark.skipif(
    not has_bfloat16_kernels(), reason="only kernels for AVX-512 read weights in oneDNN's layout"
)
ENGINES = [pytest.param("AMXBF16", marks=needs_kernel), pytest.param("oneDNN", marks=needs_onednn), "torch"]
FASTEST = "torch" if KERNEL_PROBLEM else "AMXBF16"
"""the engine of tests that take one, whichever can run"""
