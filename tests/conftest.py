from __future__ import annotations

import logging
import os
import signal
from pathlib import Path

import pytest

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("LLAMAFACTORY_VERBOSITY", "WARN")

from llamafactory_kt.engines.ktkernel.runtime import kernel_problem
from llamafactory_kt.matmul.linear import has_bfloat16_kernels, onednn_problem
from llamafactory_kt.model import columns, packing, products

signal.signal(signal.SIGINT, signal.default_int_handler)  # in the background, a shell has it ignored

collect_ignore = ["standin"]  # packages that tests put before a server's interpreter; importing them runs a server

KERNEL_PROBLEM = kernel_problem()
needs_kernel = pytest.mark.skipif(KERNEL_PROBLEM is not None, reason=str(KERNEL_PROBLEM))
BASE_PROBLEM = kernel_problem("AVX2BF16")
needs_base_kernel = pytest.mark.skipif(BASE_PROBLEM is not None, reason=str(BASE_PROBLEM))
needs_onednn = pytest.mark.skipif(onednn_problem() is not None, reason=str(onednn_problem()))
needs_bfloat16_kernels = pytest.mark.skipif(
    not has_bfloat16_kernels(), reason="only kernels for AVX-512 read weights in oneDNN's layout"
)
PACKED = [pytest.param("oneDNN's layout", marks=needs_bfloat16_kernels), "columns"]


def pack_as(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """Weights that are packed are so in one of ``PACKED``; for columns, small sizes will do."""
    if kind == "columns":
        pretend_no_bfloat16_kernels(monkeypatch)
        monkeypatch.setattr(columns, "WIDTH", 8)


def pretend_no_bfloat16_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compute as CPUs without AVX-512 do."""
    for module in (products, packing):
        monkeypatch.setattr(module, "has_bfloat16_kernels", lambda: False)


SGLANG_CONTRACT = "SGLang's contract was tested with"
ENGINES = [pytest.param("AMXBF16", marks=needs_kernel), pytest.param("oneDNN", marks=needs_onednn), "torch"]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say whether sglang-kt itself was there (its import may be impossible) or its recorded options had to do."""
    reports = [report for reports in terminalreporter.stats.values() for report in reports]
    properties = [pair for report in reports for pair in getattr(report, "user_properties", ())]
    for used in sorted({value for name, value in properties if name == SGLANG_CONTRACT}):
        terminalreporter.write_line(f"{SGLANG_CONTRACT} {used}.")


@pytest.fixture(scope="session")
def demo() -> Path:
    return Path(__file__).parents[1] / "examples" / "demo"


@pytest.fixture
def kt_log(caplog: pytest.LogCaptureFixture):
    """caplog that sees the package's records, once each, also after LLaMA-Factory's handlers were adopted."""
    logger = logging.getLogger("llamafactory_kt")
    level, propagate = logger.level, logger.propagate
    logger.setLevel(logging.INFO)
    logger.propagate = False
    logger.addHandler(caplog.handler)
    yield caplog
    logger.removeHandler(caplog.handler)
    logger.setLevel(level)
    logger.propagate = propagate
