"""Run Python code in an interpreter of its own."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path


def python(code: str, *path: Path, **environment: str) -> subprocess.CompletedProcess:
    inherited = filter(None, [os.environ.get("PYTHONPATH")])
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([*map(str, path), *inherited]), **environment}
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, env=env, cwd="/", timeout=300
    )


CHAT = """
    from llamafactory.chat import ChatModel
    try:
        ChatModel(dict(model_name_or_path={model!r}, template="deepseek", use_kt={kt}, {more}))
        print("loaded")
    except Exception as error:
        print(type(error).__name__, error)
"""
