"""An engine is one class and one registration: another distribution brings one, and every command takes it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
from helpers.chats import EXPECTED, answers, config
from helpers.places import CLI

from llamafactory_kt import KTConfigError
from llamafactory_kt.engines import registry
from llamafactory_kt.engines.base import Engine
from llamafactory_kt.engines.reference import ReferenceEngine
from llamafactory_kt.engines.registry import backend_names, canonical_name, find_engine

EXAMPLE = '''
import torch
from torch.nn.functional import silu
from llamafactory_kt.engines.base import Engine

class ExampleEngine(Engine):
    """float64, one expert at a time."""
    name, lora = "example", None
    def load(self):
        self.experts = [[matrix.double() for matrix in expert] for expert in self.read_experts(torch.float32)]
    def set_lora(self, lora):
        before, self.lora = self.lora, lora
        return lambda: setattr(self, "lora", before)
    def forward(self, hidden, index, weights):
        out, x = torch.zeros(hidden.shape, dtype=torch.float64), hidden.double()
        for number in index.unique().tolist():
            delta = [self.lora.delta(p, number) if self.lora else 0 for p in ("gate", "up", "down")]
            gate, up, down = (w + d for w, d in zip(self.experts[number], delta))
            token, slot = torch.where(index == number)
            out[token] += (silu(x[token] @ gate.T) * (x[token] @ up.T)) @ down.T * weights[token, slot, None]
        return out.to(hidden.dtype)
    nbytes, lora_nbytes = property(lambda self: sum(m.nbytes for e in self.experts for m in e)), 0
'''


@pytest.fixture
def example(tmp_path) -> dict[str, str]:
    """The environment of a process that has a distribution with the example engine."""
    (tmp_path / "example_engine.py").write_text(EXAMPLE)
    metadata = tmp_path / "example_engine-1.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: example-engine\nVersion: 1\n")
    (metadata / "entry_points.txt").write_text("[llamafactory_kt.engines]\nexample = example_engine:ExampleEngine\n")
    return {**os.environ, "PYTHONPATH": str(tmp_path), "PYTHONIOENCODING": "utf-8", "LLAMAFACTORY_VERBOSITY": "INFO"}


def test_another_distribution_brings_an_engine(tmp_path, demo, example):
    """``kt_backend: example`` chats with the adapter, verify finds every layer right, bench and doctor name it."""
    yaml = config(tmp_path, demo, adapter_name_or_path=str(demo / "adapter"), kt_backend="Example", kt_num_threads=None)

    def start(*words: str | Path) -> subprocess.Popen:
        return subprocess.Popen(words, env=example, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8")  # fmt: skip

    command = sys.executable, "-m", "llamafactory_kt"
    results = {}
    for pair in (
        {"chat": start(CLI, "chat", yaml), "verify": start(*command, "verify", yaml, "--json")},
        {
            "doctor": start(*command, "doctor", yaml, "--json"),
            "bench": start(
                *command,
                "bench",
                yaml,
                "--rounds",
                "1",
                "--new-tokens",
                "2",
                "--no-base",
                "--prompt-tokens",
                "8",
                "--json",
                "-",
            ),
        },
    ):  # two at a time, as most of each is imports
        for name, process in pair.items():
            said = process.communicate("Tell me a joke.\nexit\n" if name == "chat" else None, timeout=240)
            assert process.returncode == 0, f"{name}: {said}"
            results[name] = said[0]
    chat = subprocess.CompletedProcess([], 0, results["chat"])
    assert answers(chat) == [EXPECTED["Tell me a joke."]["adapter"]]
    assert "Engine          │ example " in results["chat"] and "consumed 200 of 200" in results["chat"]
    verified = json.loads(results["verify"])
    assert verified["passed"] and {layer["engine"] for layer in verified["layers"]} == {"example"}
    [row] = json.loads(results["bench"])["rows"]
    assert row["loaded"]["engine"].startswith("example with ")
    texts = {finding["subject"]: finding["text"] for finding in json.loads(results["doctor"])["findings"]}
    assert "example" in texts["engines"] and "example with " in texts["experts"]


def test_names():
    assert backend_names()[0] == "auto" and len(set(backend_names())) == len(backend_names())
    assert canonical_name("onednn") == "oneDNN" and canonical_name("amxint4_SFT") == "AMXINT4"
    assert find_engine("AUTO") is None and find_engine("Torch").name == "torch"
    with pytest.raises(
        KTConfigError, match=r"unknown value 'AMXBF15', expected one of auto, .*; did you mean AMXBF16?"
    ):
        canonical_name("AMXBF15")


class Nameless(ReferenceEngine):
    name = None


class Taken(ReferenceEngine):
    name, aliases = "another", ("AMXBF16",)


class Unfinished(Engine):
    name = "unfinished"


def test_broken_engines_of_others_are_left_out(monkeypatch, caplog):
    """With a warning that names the distribution; everything else goes on."""
    registered = {
        "Nameless": "it has no name", "Taken": "there is already an engine called AMXBF16",
        "Unfinished": "it does not define forward", "CLI": "is not a subclass of Engine", "missing": "AttributeError",
    }  # fmt: skip
    points = [EntryPoint(name, f"{__name__}:{name}", registry.ENTRY_POINTS) for name in registered]
    monkeypatch.setattr(registry, "entry_points", lambda group: points)
    with caplog.at_level("WARNING"):
        found = registry.engines.__wrapped__()
    assert found == registry.engines()
    for name, problem in registered.items():
        assert any(f"The engine {name!r} of" in text and problem in text for text in caplog.messages), name
