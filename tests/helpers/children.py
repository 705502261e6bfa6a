"""Run code in children of an interpreter that has imported the libraries: importing them is most of what a command takes.

A child imports LLaMA-Factory and this package itself, and its hooks are set as in any process, by what ``import torch`` registers. What depends
on how a process begins (activation, an encoding, a library's environment variable) belongs into :mod:`helpers.interpreters`.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import gc
import json
import os
import signal
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path
from types import ModuleType

LIBRARIES = ["torch", "torchvision", "torchaudio", "peft", "datasets", "omegaconf", "pydantic", "transformers.generation.utils", "transformers.models.auto.modeling_auto"]  # fmt: skip
CLI, KT = "from llamafactory.cli import main; main()", "from llamafactory_kt.cli import main; main()"
"""the scripts ``llamafactory-cli`` and ``llamafactory-kt``"""
ENVIRONMENT = dict(os.environ)
"""no test's own: libraries read it while they are imported"""


def child(code: str, *arguments: str | Path, stdin: str = "", **environment: str) -> subprocess.CompletedProcess:
    """What ``python -c code arguments`` does, in the root directory; it is ended after nine minutes."""
    with tempfile.TemporaryDirectory() as directory:
        files = [Path(directory, name) for name in ("stdin", "stdout", "stderr")]
        files[0].write_text(stdin, "utf-8")
        words = ["-c", *map(str, arguments)]
        request = {
            "code": textwrap.dedent(code),
            "argv": words,
            "files": [*map(str, files)],
            "env": {**os.environ, **environment},
        }
        _parent().stdin.write(json.dumps(request) + "\n")
        status = int(_parent().stdout.readline())
        return subprocess.CompletedProcess(words, status, *(file.read_text("utf-8") for file in files[1:]))


@functools.cache
def _parent() -> subprocess.Popen:
    process = subprocess.Popen(
        [sys.executable, __file__],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        bufsize=1,
        cwd="/",
        env=ENVIRONMENT,
    )
    atexit.register(process.communicate)
    return process


def _next_request() -> dict:
    """The parent stays in here, and a child leaves."""
    for line in sys.stdin:
        request = json.loads(line)
        if not (process := os.fork()):
            return request
        status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        print(status, flush=True)
    os._exit(0)


def _become(request: dict) -> None:
    """Standard streams, environment and arguments of the request."""
    signal.alarm(540)  # before pytest gives up
    os.environ.clear()
    os.environ.update(request["env"])
    for number, (path, flags) in enumerate(
        zip(request["files"], (os.O_RDONLY, *[os.O_WRONLY | os.O_CREAT] * 2), strict=True)
    ):
        file = os.open(path, flags)
        os.dup2(file, number)
        os.close(file)
    sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115 - the old one has read ahead
    sys.argv = request["argv"]


if __name__ == "__main__":
    for name in LIBRARIES:
        with contextlib.suppress(ImportError):  # a child that needs it says so
            __import__(name)
    gc.freeze()  # children need not look through all this, nor copy it
    sys.path[0] = str(Path(__file__).parents[1])  # children may import helpers; it was this folder
    request = _next_request()
    _become(request)
    sys.modules["__main__"] = ModuleType("__main__")  # without a file, as with -c: what it spawns looks there
    exec(compile(request["code"], "<string>", "exec"), vars(sys.modules["__main__"]))
