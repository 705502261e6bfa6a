"""Run all checks in order; a check that raises becomes an error of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ...ground.errors import describe
from . import configuration, environment, machine, packages
from .finding import Finding, Findings, Status, error


def diagnose(config: Path | None = None, overrides: Sequence[str] = ()) -> list[Finding]:
    """Check the environment, the machine and, if one is given, a YAML for a chat.

    Args:
        config: a configuration as ``llamafactory-cli chat`` takes it.
        overrides: ``key=value``, as on LLaMA-Factory's command line.
    """
    imports = packages.try_imports()
    findings: list[Finding] = []

    def run(check: Callable[..., Findings], *arguments: Any) -> bool:
        """Add a check's findings; returns whether none is an error."""
        count = len(findings)
        try:
            for finding in check(*arguments):
                findings.append(finding)
        except Exception as problem:
            text = f"could not be checked: {describe(problem)}"
            findings.append(error(check.__name__, text, "Please report this with the packages' versions."))
        return not any(finding.status is Status.ERROR for finding in findings[count:])

    run(packages.python)
    run(packages.versions)
    run(packages.forks)
    run(packages.libraries, imports)
    run(environment.variables)
    sound = imports.works("torch", "transformers", "peft", "llamafactory")
    hooked = sound and run(packages.hooks)
    run(machine.cpu)
    run(machine.memory)
    run(machine.numa)
    run(machine.disk)
    if imports.works("torch"):
        run(machine.gpu)
        run(machine.native_kernels)
    safe = sound and "kt_kernel" not in imports.crashing
    if safe:
        run(machine.engines)
    if config is not None and hooked and safe:
        run(configuration.configuration, config, overrides)
    elif config is not None:
        advice = "Fix the errors above first; it needs LLaMA-Factory's parser."
        findings.append(error("configuration", f"{config} was not looked at", advice))
    return findings
