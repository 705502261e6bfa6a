"""What precision costs a model that speaks: SmolLM2-135M-Instruct as a mixture of experts, made by examples/smollm2-moe."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.marks import needs_native
from helpers.places import ROOT

from llamafactory_kt.ground.machine import cache_directory

pytestmark = [pytest.mark.nightly, needs_native]
QUESTION = "Explain in two sentences why the sky is blue."


def run(*words: object, **options: object) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, *map(str, words)], capture_output=True, text=True, **options)


def printed(*words: object) -> dict:
    """What a command prints as JSON."""
    result = run("-m", "llamafactory_kt", *words)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


@pytest.fixture(scope="module")
def chat() -> Path:
    """Its configuration, in the cache, where it is made once."""
    directory = cache_directory() / "smollm2-moe"
    made = run(ROOT / "examples" / "smollm2-moe" / "make.py", directory)
    if "CalledProcessError" in made.stderr:
        pytest.skip(f"PyPI's packages cannot be had: {made.stderr.strip().splitlines()[-1]}")
    assert made.returncode == 0, made.stderr
    return directory / "chat.yaml"


@pytest.mark.parametrize("engine", ["native", "INT8"])
def test_it_speaks(chat, engine):
    command = ["-m", "llamafactory.cli", "chat", chat, f"kt_backend={engine}"]
    answer = run(*command, input=f"{QUESTION}\nexit\n", env={**os.environ, "LLAMAFACTORY_VERBOSITY": "WARN"})
    assert answer.returncode == 0, answer.stderr
    assert "The sky is blue because of" in answer.stdout


def test_precision_costs_what_it_should(chat):
    rows = [
        "kt_backend=native",
        "--quality",
        "--chunks",
        2,
        "--against",
        "kt_backend=INT8",
        "--against",
        "kt_backend=INT4",
        "--against",
        "kt_backend=INT4 kt_dense=int4",
    ]
    found = printed("bench", chat, *rows, "--json", "-")
    native, int8, int4, everywhere = found["rows"]
    assert 20 < found["perplexity"] < 50, "a language model, on a text that it has not seen"
    assert 0 < native["mean_kld"] < 0.005 and int8["mean_kld"] < 0.01, "little more than bfloat16's rounding"
    assert native["mean_kld"] < int8["mean_kld"] + 0.001
    assert 3 * int8["mean_kld"] < int4["mean_kld"] < 0.2
    assert native["same_top"] > 0.93 and int8["same_top"] > 0.93 and 0.7 < int4["same_top"] < int8["same_top"]
    assert abs(native["perplexity_ratio"] - 1) < 0.02 and abs(int8["perplexity_ratio"] - 1) < 0.02
    assert 1 < int4["perplexity_ratio"] < 1.2
    assert int4["mean_kld"] < everywhere["mean_kld"] < 0.4 and everywhere["perplexity_ratio"] < 1.5

    verified = printed("verify", chat, "kt_backend=INT8", "--quality", "--chunks", 2, "--json")
    assert verified["passed"] and verified["quality"]["rows"][0]["mean_kld"] == pytest.approx(int8["mean_kld"])
