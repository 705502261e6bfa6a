"""Prints an installed SGLang's options and models as JSON; runs in the interpreter that will run the server.

Executed as ``python -c``, so it uses only SGLang and the standard library. SGLang writes to stdout while it is imported, so a
mark precedes the JSON. Made for sglang-kt 0.7.2: uses ``ServerArgs.add_cli_args``, argparse's ``_actions``, and the line
``EntryClass = ...`` in srt/models/*.py. The caller reports any exception as an SGLang that cannot be imported.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import pathlib
import re
from importlib import metadata
from typing import Any

MARK = "llamafactory-kt probe: "


def version(*names: str) -> str | None:
    for name in names:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return None


def options() -> list[dict[str, Any]]:
    """The options of ``python -m sglang.launch_server``, as they are registered with argparse."""
    from sglang.srt.server_args import ServerArgs

    parser = argparse.ArgumentParser(add_help=False)
    ServerArgs.add_cli_args(parser)
    return [
        {
            "flags": action.option_strings,
            "dest": action.dest,
            "nargs": action.nargs,
            "type": action.type.__name__ if action.type in (int, float) else None,
            "choices": None if action.choices is None else sorted(map(str, action.choices)),
            "default": action.default if isinstance(action.default, (str, int, float, bool)) else None,
        }
        for action in parser._actions
        if action.option_strings
    ]


def architectures(package: pathlib.Path) -> list[str]:
    """The models' class names, read from the sources because importing them needs a GPU."""
    names: set[str] = set()
    for file in (package / "srt" / "models").glob("*.py"):
        for entry in re.findall(r"^EntryClass\s*=\s*(\[[^\]]*\]|\w+)", file.read_text(encoding="utf-8"), re.M):
            names.update(re.findall(r"\w+", entry))
    return sorted(names)


def report() -> dict[str, Any]:
    spec = importlib.util.find_spec("sglang")
    found: dict[str, Any] = {
        "installed": spec is not None,
        "distribution": "sglang-kt" if version("sglang-kt") else "sglang",
        "version": version("sglang-kt", "sglang"),
        "kt_kernel": version("kt-kernel") if importlib.util.find_spec("kt_kernel") else None,
    }
    for place in (spec.submodule_search_locations or ()) if spec else ():
        found |= {"options": options(), "architectures": architectures(pathlib.Path(place))}
    return found


if __name__ == "__main__":
    print("\n" + MARK + json.dumps(report()))
