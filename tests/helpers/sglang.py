"""The SGLang servers that tests use: a stand-in (helpers/standin), and sglang-kt itself, installed into a directory of
its own."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import yaml

from .places import DATA

STANDIN = Path(__file__).parent / "standin"
RECORDED = DATA / "sglang-kt-0.7.2.json"
SGLANG_CONTRACT = "SGLang's contract was tested with"
"""a test's property that pytest's summary repeats"""

# sglang-kt 0.7.2 and what its server_args.py imports beyond llamafactory's and kt-kernel's own dependencies.
PACKAGES = [
    "sglang-kt==0.7.2",
    "openai==2.6.1",
    "jiter",
    "distro",
    "sniffio",
    "pybase64",
    "pyzmq",
    "partial-json-parser",
    "orjson",
    "jsonschema",
    "attrs",
    "jsonschema-specifications",
    "referencing",
    "rpds-py",
    "ipython",
    "traitlets",
    "decorator",
    "stack-data",
    "executing",
    "asttokens",
    "pure-eval",
    "matplotlib-inline",
    "jedi",
    "parso",
    "pexpect",
    "ptyprocess",
    "prompt-toolkit",
    "wcwidth",
    "ipython-pygments-lexers",
]


def interpreter(directory: Path, packages: Path = STANDIN, **environment: str) -> Path:
    """A Python with one more directory of packages; its own path contains a space."""
    path = directory / "a venv" / "python"
    path.parent.mkdir(parents=True, exist_ok=True)
    variables = " ".join(f"{name}='{value}'" for name, value in {"PYTHONPATH": str(packages), **environment}.items())
    path.write_text(f'#!/bin/sh\nexec env {variables} "{sys.executable}" "$@"\n')
    path.chmod(0o755)
    return path


def install_sglang_kt(directory: Path) -> str | None:
    """Install sglang-kt into a directory of its own. Returns the reason if that is impossible."""
    uv = shutil.which("uv") or shutil.which("uv", path=str(Path(sys.executable).parent))
    pip = [uv, "pip", "install", "--python", sys.executable] if uv else [sys.executable, "-m", "pip", "install"]
    result = subprocess.run(
        [*pip, "--quiet", "--no-deps", "--target", directory, *PACKAGES], capture_output=True, text=True, timeout=300
    )
    return (result.stderr.strip() or "pip failed").splitlines()[-1] if result.returncode else None


def configuration(directory: Path, python: Path, model: Path, **keys) -> Path:
    """Write a YAML for the server that ``python`` has."""
    values = {
        "model_name_or_path": str(model), "template": "deepseek", "infer_backend": "sglang", "use_kt": True,
        "kt_sglang_python": str(python), "kt_threadpool_count": 1, "do_sample": False, **keys,
    }  # fmt: skip
    path = directory / "serve.yaml"
    path.write_text(yaml.safe_dump({k: v for k, v in values.items() if v is not None}, allow_unicode=True), "utf-8")
    return path


def notes(path: Path) -> list[dict]:
    """What the stand-in wrote to STANDIN_NOTES."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (ProcessLookupError, FileNotFoundError):
        return False


def gone(*pids: int) -> bool:
    """Whether these processes end; a minute is far more than they need."""
    for _ in range(1200):
        if not any(map(alive, pids)):
            return True
        time.sleep(0.05)
    return False


def experts_only(directory: Path, adapter: Path) -> Path:
    """A copy of the adapter with its expert LoRA alone."""
    return _copy(directory, adapter, lambda name: ".mlp.experts." in name)


def rest_only(directory: Path, adapter: Path) -> Path:
    """A copy without expert LoRA, and without LoRA on kv_b_proj, which SGLang takes only together with expert LoRA."""
    return _copy(directory, adapter, lambda name: ".mlp.experts." not in name and ".kv_b_proj." not in name)


def _copy(directory: Path, adapter: Path, keep: Callable[[str], bool]) -> Path:
    from .adapters import edit_adapter  # imports PEFT, which pytest's first process, with conftest.py, does not need

    shutil.copytree(adapter, directory)
    return edit_adapter(directory, lambda tensors: {name: t for name, t in tensors.items() if keep(name)})
