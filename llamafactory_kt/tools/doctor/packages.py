"""Python, the installed distributions, whether they import, and whether the hooks hold."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from dataclasses import dataclass
from importlib import metadata

from ...ground.errors import describe
from .finding import Findings, error, ok

DISTRIBUTION = "llamafactory-kt-experts"

STOCK = {
    "llamafactory": "llamafactory", "transformers": "transformers", "accelerate": "accelerate", "peft": "peft",
    "trl": "trl", "torch": "torch", "kt_kernel": "kt-kernel",
}  # fmt: skip
"""import package -> the distribution it must come from"""

LIBRARIES = ("torch", "torchvision", "torchaudio", "kt_kernel", "transformers", "peft", "llamafactory")
"""imported one after the other in a process of their own"""

_PROBE = """
import importlib, json, os, sys
out = os.dup(1)
os.dup2(2, 1)  # what the libraries print is not ours
def say(*words):
    os.write(out, (json.dumps(words) + "\\n").encode())
for name in sys.argv[1:]:
    say("begin", name, "")
    try:
        importlib.import_module(name)
        say("ok", name, "")
    except BaseException as error:
        say("failed", name, type(error).__name__ + ": " + " ".join(str(error).split()))
"""


def python() -> Findings:
    """The interpreter, against the wheels that kt-kernel has."""
    found = f"{platform.python_version()} at {sys.executable}"
    if (3, 11) <= sys.version_info[:2] <= (3, 12) and platform.machine() == "x86_64" and sys.platform == "linux":
        yield ok("Python", found)
    else:
        yield error(
            "Python", f"{found} on {platform.system()} {platform.machine()}",
            "kt-kernel has wheels for Linux on x86-64 with Python 3.11 and 3.12 only.",
        )  # fmt: skip


def versions() -> Findings:
    """Installed versions against the ranges that the installed distribution asks for."""
    from packaging.requirements import Requirement

    try:
        wanted = [Requirement(line) for line in metadata.requires(DISTRIBUTION) or []]
        yield ok(DISTRIBUTION, metadata.version(DISTRIBUTION))
    except metadata.PackageNotFoundError:
        yield error(
            DISTRIBUTION, "not installed in this environment",
            "pip install . in a clone; without it nothing is activated at `import torch`.",
        )  # fmt: skip
        return
    for requirement in wanted:
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        name, allowed = requirement.name, str(requirement.specifier)
        install = f'pip install "{name}{allowed}"'
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            yield error(name, f"not installed; wanted {allowed}", install)
            continue
        if requirement.specifier.contains(version, prereleases=True):
            yield ok(name, f"{version} ({allowed})")
        else:
            yield error(name, f"{version} is outside of {allowed}, which is what the tests have run with", install)


def forks() -> Findings:
    """Import packages that another distribution than the stock one has installed, or has installed too."""
    owners = metadata.packages_distributions()
    strange = {
        package: sorted(set(owners.get(package, ())) - {stock}) for package, stock in STOCK.items() if package in owners
    }
    for package, others in strange.items():
        if others:
            stock = STOCK[package]
            yield error(
                f"package {package}", f"installed by {', '.join(others)} over or instead of {stock}",
                f"pip uninstall -y {' '.join(others)} && pip install --force-reinstall --no-deps {_pinned(stock)}",
            )  # fmt: skip
    if not any(strange.values()):
        yield ok("forks", f"none over {', '.join(strange)}")


def _pinned(name: str) -> str:
    """The requirement of our distribution on ``name``, quoted for a shell; the bare name where it has none."""
    from packaging.requirements import Requirement

    try:
        lines = metadata.requires(DISTRIBUTION) or []
    except metadata.PackageNotFoundError:
        return name
    return next((f'"{name}{r.specifier}"' for r in map(Requirement, lines) if r.name == name), name)


@dataclass(frozen=True)
class Imports:
    """What became of importing :data:`LIBRARIES`."""

    problems: dict[str, str]
    """library -> why it does not import; those that do are not in it"""
    deadly: frozenset[str]
    """libraries that end the process instead of raising; nothing here may import them"""

    def works(self, *names: str) -> bool:
        """Whether all of these import."""
        return not any(name in self.problems for name in names)


def try_imports() -> Imports:
    """Import the libraries in a process of their own: a build for another CPU ends it with a signal."""
    problems: dict[str, str] = {}
    deadly: set[str] = set()
    left = list(LIBRARIES)
    while left:
        command = [sys.executable, "-c", _PROBE, *left]
        result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=False)
        said = [json.loads(line) for line in result.stdout.splitlines()]
        problems |= {name: text for word, name, text in said if word == "failed"}
        if not result.returncode:
            break
        name = said[-1][1] if said else left[0]
        problems[name] = f"ends the process ({_ending(result.returncode)})"
        deadly.add(name)
        left = left[left.index(name) + 1 :]
    return Imports(problems, frozenset(deadly))


def libraries(imports: Imports) -> Findings:
    """Whether the libraries import."""
    for name in LIBRARIES:
        if name in imports.problems:
            yield error(f"import {name}", imports.problems[name], _repair(name))
        else:
            yield ok(f"import {name}", "works")


def _ending(code: int) -> str:
    import signal

    return signal.Signals(-code).name if code < 0 else f"exit status {code}"


def _repair(name: str) -> str:
    stock = name.replace("_", "-")
    if name in ("torchvision", "torchaudio"):
        return f"It must be the release that belongs to torch: pip install --force-reinstall --no-deps {_pinned(stock)}"
    return f"pip install --force-reinstall --no-deps {_pinned(stock)}"


def hooks() -> Findings:
    """Whether LLaMA-Factory is hooked in a process that imports torch, as ``llamafactory-cli`` does."""
    import torch  # noqa: F401 (calls the entry point)

    from ...integration import bootstrap
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
        yield error("hooks", describe(problem), "pip install llamafactory==0.9.5; chats without use_kt still work.")
        return
    for module, failure in bootstrap.failures.items():
        yield error("hooks", f"{module}: {describe(failure)}", "pip install llamafactory==0.9.5")
    if not bootstrap.failures:
        yield ok("hooks", f"applied: {versions()}")
