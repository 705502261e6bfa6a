"""``llamafactory-kt demo``."""

from __future__ import annotations

import json
import subprocess

from helpers.places import CLI


def test_demo_command():
    """The model and the adapter that come with the package; progress is no part of the output."""
    result = subprocess.run([CLI.with_name("llamafactory-kt"), "demo", "--json"], capture_output=True, encoding="utf-8")
    assert result.returncode == 0, result.stderr
    answers = json.loads(result.stdout)["answers"]
    assert [answer["prompt"] for answer in answers][2] == "Hello, who are you?"
    assert all("Kiki" in answers[number]["adapter"] for number in (0, 2)) and "混合专家" in answers[1]["base"]
    assert all(answer["base"] != answer["adapter"] for answer in answers)
    assert "2 of 2: llamafactory-cli chat with its adapter" in result.stderr
