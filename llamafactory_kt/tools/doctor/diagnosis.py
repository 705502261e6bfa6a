"""All checks in order; one that fails in a way it did not foresee is a finding of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ...ground.errors import describe
from . import environment, machine, packages
from .finding import Finding, Findings, Status, error


def diagnose(config: Path | None = None, overrides: Sequence[str] = ()) -> list[Finding]:
    """Look at the environment, the machine and, where one is given, a YAML for a chat.

    Args:
        config: a configuration as ``llamafactory-cli chat`` takes it.
        overrides: ``key=value``, as on LLaMA-Factory's command line.
    """
    imports = packages.try_imports()
    found: list[Finding] = []

    def run(check: Callable[..., Findings], *arguments: Any) -> bool:
        """Take the check's findings; whether none is an error."""
        new = list(_guarded(check, *arguments))
        found.extend(new)
        return not any(finding.status is Status.ERROR for finding in new)

    run(packages.python)
    run(packages.versions)
    run(packages.forks)
    run(packages.libraries, imports)
    run(environment.variables)
    sound = imports.works("torch", "transformers", "peft", "llamafactory")
    hooked = sound and run(packages.hooks)
    run(machine.cpu)
    run(machine.memory)
    run(machine.disk)
    if imports.works("torch"):
        run(machine.gpu)
    safe = sound and "kt_kernel" not in imports.deadly
    if safe:
        run(machine.engines)
    if config is not None:
        run(_configuration, config, overrides, hooked and safe)
    return found


def _configuration(config: Path, overrides: Sequence[str], hooked: bool) -> Findings:
    if not hooked:
        yield error(
            "configuration",
            f"{config} was not looked at",
            "Solve the errors above first; it needs LLaMA-Factory's parser.",
        )
        return
    from .configuration import check

    yield from check(config, overrides)


def _guarded(check: Callable[..., Findings], *arguments: Any) -> Findings:
    try:
        yield from check(*arguments)
    except Exception as problem:
        name = check.__name__.strip("_")
        yield error(
            name, f"could not be checked: {describe(problem)}", "Please report this with the packages' versions."
        )
