"""Standard streams in any locale, and a stdout for Python alone."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

ECHO = """
import ctypes, logging, sys
from llamafactory_kt.ground.streams import keep_stdout_clean, take_any_text
logging.basicConfig(stream=sys.stdout, level="INFO", format="%(message)s")
take_any_text()
ctypes.CDLL(None).puts(b"before")
keep_stdout_clean()
ctypes.CDLL(None).puts(b"of a library")
print(input())
logging.info("\\u2502 logged")
"""


def run(line: bytes, **environment: str) -> subprocess.CompletedProcess:
    names = ("LC_ALL", "LC_CTYPE", "LANG", "PYTHONUTF8", "PYTHONIOENCODING", "PYTHONCOERCECLOCALE")
    env = {name: value for name, value in os.environ.items() if name not in names}
    return subprocess.run(
        [sys.executable, "-c", ECHO], input=line, capture_output=True, env=env | environment, timeout=60
    )


@pytest.mark.parametrize(
    "environment",
    [{}, {"LC_ALL": "C"}, {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}, {"LC_ALL": "C.UTF-8"}, {"PYTHONIOENCODING": "ascii"}],
)  # fmt: skip
def test_any_text(environment):
    done = run("你好 ".encode() + b"\xff\n", **environment)
    assert done.returncode == 0, done.stderr.decode()
    assert done.stdout.decode() == "before\n你好 �\n│ logged\n", "a library's own line is elsewhere"
    assert done.stderr == b"of a library\n"


def test_another_encoding_stays():
    done = run("你好\n".encode("gbk"), PYTHONIOENCODING="gbk")
    assert done.returncode == 0 and done.stdout.decode("gbk").splitlines()[1] == "你好"
    done = run("ä\n".encode("latin-1"), PYTHONIOENCODING="latin-1")
    assert done.returncode == 0 and done.stdout == "before\nä\n? logged\n".encode("latin-1")


def test_streams_that_a_program_has_replaced(capsys):
    from llamafactory_kt.ground.streams import keep_stdout_clean, take_any_text

    before = sys.stdin, sys.stdout
    take_any_text()
    keep_stdout_clean()
    assert (sys.stdin, sys.stdout) == before
