"""``llamafactory-kt demo``."""

from __future__ import annotations

import subprocess

from helpers.places import CLI


def test_demo_command(demo):
    result = subprocess.run(
        [CLI.with_name("llamafactory-kt"), "demo", "--directory", demo], capture_output=True, encoding="utf-8"
    )
    assert result.returncode == 0, result.stderr
    assert "Kiki" in result.stdout and "混合专家" in result.stdout
