from __future__ import annotations

import gc
import logging
import os
import signal
from pathlib import Path

import pytest

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("LLAMAFACTORY_VERBOSITY", "WARN")

from helpers.places import DEMO
from helpers.sglang import SGLANG_CONTRACT, configuration, interpreter

gc.disable()  # while tests are collected: nearly all that is made then stays
signal.signal(signal.SIGINT, signal.default_int_handler)  # in the background, a shell has it ignored

LONGEST = ("test_binary.py::test_sanitizers", "test_soak.py::test_thousands_of_turns", "test_bench.py::test_a_real_run", "test_quality.py::test_a_real_run")  # fmt: skip
"""half a minute each, and more: they begin first, since at the end the other workers would wait for them"""

collect_ignore = ["helpers/standin"]  # packages for a server's interpreter; importing them runs a server


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--write-outputs", action="store_true", help="write the pages' example outputs that have changed")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: not any(test in item.nodeid for test in LONGEST))


def pytest_collection_finish() -> None:
    """Collections in tests need not look through libraries and test modules."""
    gc.freeze()
    gc.enable()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say whether the tests ran with sglang-kt itself, which may be impossible to import, or with its recorded options."""
    reports = [report for reports in terminalreporter.stats.values() for report in reports]
    properties = [pair for report in reports for pair in getattr(report, "user_properties", ())]
    for used in sorted({value for name, value in properties if name == SGLANG_CONTRACT}):
        terminalreporter.write_line(f"{SGLANG_CONTRACT} {used}.")


@pytest.fixture(scope="session")
def demo() -> Path:
    return DEMO


@pytest.fixture
def kt_log(caplog: pytest.LogCaptureFixture):
    """caplog that sees each of the package's records once, even after LLaMA-Factory's handlers were adopted."""
    logger = logging.getLogger("llamafactory_kt")
    level, propagate = logger.level, logger.propagate
    logger.setLevel(logging.INFO)
    logger.propagate = False
    logger.addHandler(caplog.handler)
    yield caplog
    logger.removeHandler(caplog.handler)
    logger.setLevel(level)
    logger.propagate = propagate


@pytest.fixture(scope="module")
def worker_threads() -> None:
    """One kt-kernel worker, whatever this machine has."""
    from llamafactory_kt.engines.ktkernel.cpuinfer import fix_pool

    fix_pool(1, 1)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The directory for prepared adapters in a cache of the test's own; temporary files are the test's own too."""
    monkeypatch.setenv("LLAMAFACTORY_KT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return tmp_path / "cache" / "adapters"


@pytest.fixture
def standin(tmp_path: Path, demo: Path, cache: Path):
    """Writes a configuration for the stand-in server in a given mode; also returns the file the server keeps notes in."""

    def standin(fail: str = "", **keys):
        python = interpreter(tmp_path, STANDIN_FAIL=fail, STANDIN_NOTES=str(tmp_path / "notes"))
        return configuration(tmp_path, python, demo / "model", **keys), tmp_path / "notes"

    return standin
