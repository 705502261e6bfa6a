"""What is reported about a model that was loaded."""

from __future__ import annotations

import fcntl
import os
import struct
import termios

import pytest
from helpers.loading import load
from helpers.marks import needs
from helpers.models import make_model

from llamafactory_kt import load_report
from llamafactory_kt.ground.machine import gib
from llamafactory_kt.load_report import layer_kinds, load_rows


@pytest.mark.parametrize(
    ("architecture", "changes", "wanted"),
    [
        ("deepseek_v2", {}, "MoE 1-2, dense MLP 0 (first_k_dense_replace: 1)"),
        ("qwen3_moe", {"num_hidden_layers": 4, "decoder_sparse_step": 2, "mlp_only_layers": [3]},
         "MoE 1, dense MLP 0, 2-3 (decoder_sparse_step: 2, mlp_only_layers: [3])"),
        ("mixtral", {}, ""),
    ],
)  # fmt: skip
def test_layer_kinds(tmp_path, architecture, changes, wanted):
    model = load(make_model(tmp_path / "model", architecture, **changes), "torch")
    assert layer_kinds(model) == wanted


@needs("native")
@pytest.mark.parametrize(
    ("way", "wanted"), [("mmap", "mapped from the checkpoint's files"), ("copy", "copied into huge pages")]
)
def test_where_weights_lie(tmp_path, way, wanted):
    model = load(make_model(tmp_path / "model", "mixtral"), "native", load=way)
    rows = dict(load_rows(model))
    assert rows["Weights"] == wanted and "Native kernels" not in rows


@needs("native")
def test_mapped_weights_that_do_not_fit(tmp_path, monkeypatch):
    model = load(make_model(tmp_path / "model", "mixtral"), "native", load="mmap")
    monkeypatch.setattr(load_report, "available_memory", lambda: 1000)
    wanted = (
        f"mapped from the checkpoint's files, and larger than the {gib(1000)} that are free: tokens wait for the disk"
    )
    assert dict(load_rows(model))["Weights"] == wanted


def test_without_native_kernels(tmp_path, monkeypatch):
    model = load(make_model(tmp_path / "model", "mixtral"), "torch")
    monkeypatch.setattr(load_report, "library", lambda: "they were not built")
    rows = dict(load_rows(model))
    assert rows["Native kernels"] == "none: they were not built" and "Weights" not in rows


def test_a_table_fits_its_terminal(monkeypatch):
    """A pipe has the same width, whatever is said of it."""
    monkeypatch.setenv("COLUMNS", "40")
    rows = [("Chosen because", " ".join(["AMXBF16 cannot run"] * 9))]
    master, slave = os.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 30, 71, 0, 0))
    with open(slave, "w") as terminal, open(master), open(os.devnull, "w") as pipe:
        for stream, columns in ((terminal, 71), (pipe, 110)):
            monkeypatch.setattr("sys.stdout", stream)
            table = load_report.load_table(rows)
            assert max(map(len, table.splitlines())) == columns
