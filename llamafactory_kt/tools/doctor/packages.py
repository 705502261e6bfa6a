"""Python, the installed distributions, whether they import, and whether the hooks are in place."""

from __future__ import annotations

import json
import platform
import signal
import subprocess
import sys
from dataclasses import dataclass
from importlib import metadata
from typing import TYPE_CHECKING

from ...ground.errors import describe
from .finding import DISTRIBUTION, Findings, error, ok, warning

if TYPE_CHECKING:
    from packaging.requirements import Requirement

STOCK = {
    "llamafactory": "llamafactory", "transformers": "transformers", "accelerate": "accelerate", "peft": "peft",
    "trl": "trl", "torch": "torch", "kt_kernel": "kt-kernel",
}  # fmt: skip
"""import package -> the distribution that must have installed it"""

LIBRARIES = ("torch", "torchvision", "torchaudio", "kt_kernel", "transformers", "peft", "llamafactory")
"""imported one after the other in a process of their own; kt_kernel where it has a wheel"""

_PROBE = """
import importlib, json, os, sys
out = os.dup(1)
os.dup2(2, 1)  # the libraries' own output
def say(*words):
    os.write(out, (json.dumps(words) + "\\n").encode())
for name in sys.argv[1:]:
    say("begin", name, "")
    try:
        importlib.import_module(name)
    except BaseException as error:
        say("failed", name, type(error).__name__ + ": " + " ".join(str(error).split()))
"""


def python() -> Findings:
    """Compare the interpreter with those that the package and kt-kernel have wheels for."""
    found = f"{platform.python_version()} at {sys.executable}"
    if not (3, 11) <= sys.version_info[:2] <= (3, 13) or sys.platform != "linux":
        yield error("Python", f"{found} on {platform.system()}", "Linux with Python 3.11, 3.12 or 3.13 is needed.")
    elif _with_kernel():
        yield ok("Python", found)
    else:
        yield ok(
            "Python",
            f"{found}; kt-kernel has no wheel for it on {platform.machine()}, so oneDNN or torch compute the experts",
        )


def _requirements() -> dict[str, Requirement]:
    """The requirements of this distribution without extras, by name.

    Raises:
        PackageNotFoundError: It is not installed.
    """
    from packaging.requirements import Requirement

    wanted = [Requirement(line) for line in metadata.requires(DISTRIBUTION) or []]
    return {r.name: r for r in wanted if r.marker is None or r.marker.evaluate({"extra": ""})}


def _with_kernel() -> bool:
    """Whether kt-kernel has a wheel for this interpreter and machine."""
    try:
        return "kt-kernel" in _requirements()
    except metadata.PackageNotFoundError:
        return True


def versions() -> Findings:
    """Compare the installed versions with the ranges that this distribution requires, and with those that were tested."""
    from packaging.specifiers import SpecifierSet

    from ...ground.internals import TESTED

    try:
        wanted = _requirements()
        yield ok(DISTRIBUTION, metadata.version(DISTRIBUTION))
    except metadata.PackageNotFoundError:
        yield error(
            DISTRIBUTION, "not installed in this environment",
            "pip install . in a clone; without it nothing is activated at `import torch`.",
        )  # fmt: skip
        return
    for name, requirement in wanted.items():
        allowed = str(requirement.specifier)
        install = f'pip install "{name}{allowed}"'
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            yield error(name, f"not installed; wanted {allowed}", install)
            continue
        tested = TESTED.get(name, allowed)
        if requirement.specifier.contains(version, prereleases=True):
            yield ok(name, f"{version} ({allowed})")
        elif SpecifierSet(tested).contains(version, prereleases=True):
            yield ok(name, f"{version} (tested: {tested})")
        elif name in TESTED:
            yield warning(
                name, f"{version} is untested (tested: {tested}); each load checks three tokens of a layer", install
            )
        else:
            yield error(name, f"{version} is outside of {allowed}, which is what the tests have run with", install)


def forks() -> Findings:
    """Look for import packages that a distribution other than the stock one has installed."""
    owners = metadata.packages_distributions()
    installed = [package for package in STOCK if package in owners]
    clean = True
    for package in installed:
        if others := sorted(set(owners[package]) - {STOCK[package]}):
            clean = False
            yield error(
                f"package {package}", f"installed by {', '.join(others)} over or instead of {STOCK[package]}",
                f"pip uninstall -y {' '.join(others)} && {_reinstall(STOCK[package])}",
            )  # fmt: skip
    if clean:
        yield ok("forks", f"none over {', '.join(installed)}")


def _reinstall(name: str) -> str:
    """The pip command for a distribution, in the range that this one requires."""
    try:
        requirement = _requirements().get(name)
    except metadata.PackageNotFoundError:
        requirement = None
    pinned = f'"{name}{requirement.specifier}"' if requirement else name
    return f"pip install --force-reinstall --no-deps {pinned}"


@dataclass(frozen=True)
class Imports:
    """The result of importing :data:`LIBRARIES`."""

    problems: dict[str, str]
    """library -> why it does not import"""
    crashing: frozenset[str]
    """libraries that end the process instead of raising; doctor must not import them"""

    def works(self, *names: str) -> bool:
        """Whether all of these import."""
        return not any(name in self.problems for name in names)


def try_imports() -> Imports:
    """Import the libraries in a process of their own: a build for another CPU ends it with a signal."""
    problems: dict[str, str] = {}
    crashing: set[str] = set()
    left = [name for name in LIBRARIES if name != "kt_kernel" or _with_kernel()]
    while left:
        command = [sys.executable, "-c", _PROBE, *left]
        result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=False)
        said = [json.loads(line) for line in result.stdout.splitlines()]
        problems |= {name: text for word, name, text in said if word == "failed"}
        if not (code := result.returncode):
            break
        name = said[-1][1] if said else left[0]
        problems[name] = f"ends the process ({signal.Signals(-code).name if code < 0 else f'exit status {code}'})"
        crashing.add(name)
        left = left[left.index(name) + 1 :]
    return Imports(problems, frozenset(crashing))


def libraries(imports: Imports) -> Findings:
    """Report which libraries import."""
    for name in LIBRARIES:
        if name == "kt_kernel" and not _with_kernel():
            continue
        if name not in imports.problems:
            yield ok(f"import {name}", "works")
            continue
        torchs = "It must be the release that belongs to torch: " if name in ("torchvision", "torchaudio") else ""
        yield error(f"import {name}", imports.problems[name], f"{torchs}{_reinstall(name.replace('_', '-'))}")


def hooks() -> Findings:
    """Check that importing torch hooks LLaMA-Factory, as in ``llamafactory-cli``."""
    import torch  # noqa: F401 (runs the entry point)

    from ...integration import bootstrap
    from ...integration.known_versions import ADVICE
    from ...integration.patching import require_hooks, versions

    if not bootstrap.is_active():
        yield error(
            "hooks", "not registered at `import torch`",
            f"Install {DISTRIBUTION} into this environment; see also the environment variables in this list.",
        )  # fmt: skip
        return
    try:
        require_hooks()
    except Exception as problem:
        yield error("hooks", describe(problem), f"{ADVICE}; chats without use_kt still work.")
        return
    for module, failure in bootstrap.failures.items():
        yield error("hooks", f"{module}: {describe(failure)}", ADVICE)
    if not bootstrap.failures:
        yield ok("hooks", f"applied: {versions()}")
