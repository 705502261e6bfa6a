from __future__ import annotations

import logging
import os
import signal
from pathlib import Path

import pytest

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("LLAMAFACTORY_VERBOSITY", "WARN")

from helpers.places import DEMO
from helpers.sglang import SGLANG_CONTRACT, configuration, interpreter

signal.signal(signal.SIGINT, signal.default_int_handler)  # in the background, a shell has it ignored

collect_ignore = ["helpers/standin"]  # packages for a server's interpreter; importing them runs a server


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say whether sglang-kt itself was there (its import may be impossible) or its recorded options had to do."""
    reports = [report for reports in terminalreporter.stats.values() for report in reports]
    properties = [pair for report in reports for pair in getattr(report, "user_properties", ())]
    for used in sorted({value for name, value in properties if name == SGLANG_CONTRACT}):
        terminalreporter.write_line(f"{SGLANG_CONTRACT} {used}.")


@pytest.fixture(scope="session")
def demo() -> Path:
    return DEMO


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


@pytest.fixture(scope="module")
def worker_threads() -> None:
    """One worker of kt-kernel's, whatever this machine has."""
    from llamafactory_kt.engines.ktkernel.cpuinfer import settle_pool

    settle_pool(1, 1)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache directory and temporary files of the test's own; the directory for prepared adapters in the cache."""
    monkeypatch.setenv("LLAMAFACTORY_KT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return tmp_path / "cache" / "adapters"


@pytest.fixture
def standin(tmp_path: Path, demo: Path, cache: Path):
    """Makes a configuration for the stand-in server in a mode; also gives the file that the server will keep notes in."""

    def standin(fail: str = "", **keys):
        python = interpreter(tmp_path, STANDIN_FAIL=fail, STANDIN_NOTES=str(tmp_path / "notes"))
        return configuration(tmp_path, python, demo / "model", **keys), tmp_path / "notes"

    return standin
