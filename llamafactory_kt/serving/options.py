"""The installed SGLang: its version, its models, and its command line, all read from the installation itself."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from enum import StrEnum
from pathlib import Path
from typing import Any, NoReturn

from ..ground.errors import KTConfigError, KTServerError
from . import probe

INSTALL = (
    "Install sglang-kt into an environment of its own, since it brings other builds of transformers and accelerate: "
    "python3 -m venv /opt/sglang && /opt/sglang/bin/pip install sglang-kt==0.7.2, and then name it in the YAML: "
    "kt_sglang_python: /opt/sglang/bin/python."
)


class Dialect(StrEnum):
    """How a server takes the LoRA of routed experts."""

    EXPERT_LORA = "--kt-expert-lora-path"
    """sglang-kt 0.7: a directory with experts only, or a whole adapter in --lora-paths, which the server splits"""
    MOE_LORA = "--kt-moe-lora-path"
    """the branch before 0.7: a moe_lora.pt, with rank, alpha and method as options"""


@dataclass(frozen=True)
class ServerOptions:
    """An installed SGLang, as :mod:`probe` found it."""

    python: str
    version: str
    """``sglang-kt 0.7.2``"""
    options: list[dict[str, Any]]
    architectures: list[str]

    def __contains__(self, flag: str) -> bool:
        return self._option(flag) is not None

    @property
    def dialect(self) -> Dialect | None:
        """None: this server has no LoRA on routed experts."""
        return next((dialect for dialect in Dialect if dialect in self), None)

    def choices(self, flag: str) -> list[str]:
        """The allowed values of an option; empty: any value."""
        return (self._option(flag) or {}).get("choices") or []

    def value(self, parsed: argparse.Namespace, flag: str) -> Any:
        """The parsed value of an option, whichever of its names was used; None for an option the server does not have."""
        return getattr(parsed, option["dest"]) if (option := self._option(flag)) else None

    def _option(self, flag: str) -> dict[str, Any] | None:
        return next((option for option in self.options if flag in option["flags"]), None)

    def parse(self, arguments: Sequence[str]) -> argparse.Namespace:
        """Parse a command line as the server will.

        Raises:
            KTConfigError: The server has no such option, or the option does not accept the value.
        """
        parser = _Parser(self.version)
        for option in self.options:
            settings: dict[str, Any] = {"dest": option["dest"], "default": option["default"]}
            if option["nargs"] == 0:
                settings["action"] = "store_true"
            else:
                kinds: dict[str, type] = {"int": int, "float": float}
                settings |= {"nargs": option["nargs"], "type": kinds.get(option["type"] or "", str)}
                if option["choices"] is not None:
                    settings["choices"] = [settings["type"](choice) for choice in option["choices"]]
            parser.add_argument(*option["flags"], **settings)
        known, unknown = parser.parse_known_args(list(arguments))
        if unknown:
            flags = [flag for option in self.options for flag in option["flags"]]
            close = get_close_matches(unknown[0], flags, n=1)
            parser.error(f"it has no option {unknown[0]}{f' (did you mean {close[0]}?)' if close else ''}")
        return known


class _Parser(argparse.ArgumentParser):
    def __init__(self, version: str):
        super().__init__(add_help=False)
        self._version = version

    def error(self, message: str) -> NoReturn:
        raise KTConfigError(f"{self._version} does not take this command line: {message}.")


def discover(python: str | None = None) -> ServerOptions:
    """Ask an interpreter for its SGLang. Imports SGLang in a process of its own, which is slow.

    Args:
        python: the interpreter; None: the one that runs this process.

    Raises:
        KTServerError: There is no SGLang, it cannot be imported, or it was built without KT. The message says how to install it.
    """
    python = str(Path(python).expanduser()) if python else sys.executable
    code = Path(probe.__file__).read_text(encoding="utf-8")
    # PyTorch's autoload would bring this package's hooks into the server's interpreter.
    environment = {**os.environ, "LLAMAFACTORY_KT_DISABLE": "1"}
    try:
        result = subprocess.run(
            [python, "-c", code], capture_output=True, encoding="utf-8", errors="replace", env=environment,
            stdin=subprocess.DEVNULL,
        )  # fmt: skip
    except OSError as error:
        raise KTServerError(f"kt_sglang_python: {python} cannot be run ({error}).") from error
    _, mark, line = result.stdout.rpartition(probe.MARK)
    if not mark:
        last = (result.stderr.strip() or "no message").splitlines()[-1]
        raise KTServerError(
            f"SGLang cannot be imported by {python}: {last}. Look at {python} -c 'import sglang.srt.server_args'. {INSTALL}"
        )
    return _check(python, json.loads(line))


def _check(python: str, found: dict[str, Any]) -> ServerOptions:
    if not found["installed"]:
        raise KTServerError(f"{python} has no SGLang. {INSTALL}")
    version = f"{found['distribution']} {found['version'] or '(version unknown)'}"
    options = ServerOptions(python, version, found["options"], found["architectures"])
    if "--kt-weight-path" not in options:
        raise KTServerError(f"{python} has {version}, an SGLang without KTransformers (no --kt-weight-path). {INSTALL}")
    if found["kt_kernel"] is None:
        raise KTServerError(f"{python} has {version}, but no kt-kernel: {python} -m pip install kt-kernel==0.7.2.")
    return options
