"""What all commands have in common: help, examples, overrides, ``--json``, exit codes, and output that is piped."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys

import pytest
import typer.main
import yaml
from helpers.children import KT, child
from typer.testing import CliRunner

from llamafactory_kt.cli import app
from llamafactory_kt.cli.help import HELP

COMMAND = typer.main.get_command(app)


def parsed(line: str) -> dict[str, object]:
    """The parameters of a command line; it is not run."""
    command, words = COMMAND, shlex.split(line)
    context = command.context_class(command, info_name="llamafactory-kt")
    while hasattr(command, "commands"):
        name = words.pop(0)
        command = command.get_command(context, name)
        made = command.context_class(command, info_name=name, parent=context) if hasattr(command, "commands") else None
        context = made or command.make_context(name, words, parent=context)
    return context.params


def every_command() -> set[str]:
    names = set()
    for name, command in COMMAND.commands.items():
        names |= {f"{name} {below}" for below in command.commands} if hasattr(command, "commands") else {name}
    return names


def test_each_command_has_examples():
    assert set(HELP) == every_command()


@pytest.mark.parametrize("name", sorted(HELP))
def test_help(name):
    """Short, with examples on one line each, and without types where there is no value."""
    result = CliRunner().invoke(app, [*name.split(), "-h"])
    assert result.exit_code == 0
    summary, *lines = HELP[name]
    assert all(f"  llamafactory-kt {line}\n" in result.output for line in lines) and lines
    assert not re.search("<[a-z]", result.output) and "…" not in result.output
    if " " not in name:
        listed = CliRunner().invoke(app, ["--help"]).output
        assert f" {summary}\n" in listed, "not cut"


@pytest.mark.parametrize("line", [line for lines in HELP.values() for line in lines[1:]])
def test_examples_are_command_lines(line, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    parsed(line)


@pytest.mark.parametrize(
    ("words", "offered"),
    [("es", "estimate"), ("convert --format sglang-", "sglang-merged"), ("quantize --method i", "int8 int4"), ("bench --synthetic m", "mixtral-8x7b")],
)  # fmt: skip
def test_completion(words, offered):
    line = f"llamafactory-kt {words}"
    asked = {"_LLAMAFACTORY_KT_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": str(line.count(" "))}
    done = subprocess.run(
        [sys.executable, "-m", "llamafactory_kt"], capture_output=True, text=True, env={**os.environ, **asked}
    )
    assert done.stdout.split() == offered.split(), done.stderr


@pytest.mark.parametrize(
    "words",
    [
        ["estimate"],
        ["doctor", "chat.yaml", "kt_backend"],
        ["verify", "chat.yaml", "kt_backend"],
        ["bench"],
        ["bench", "chat.yaml", "--against", "stok"],
        ["bench", "--synthetic", "mixtral-9x9"],
        ["compare", "kt_backend=INT4", "--prompts", "p.jsonl", "--output", "out"],
        ["generate", "chat.yaml", "max_new_tokens", "--prompts", "p.jsonl", "--output", "a.jsonl"],
        ["serve", "chat.yaml", "port"],
        ["inspect", "my_adapter", "--no-such-option"],
        ["convert", "--input", "my_adapter", "--output", "directory"],
        ["quantize", "--model", "m", "--output", "out", "--method", "int5"],
        ["generate", "chat.yaml", "--prompts", "p.jsonl", "--output", "a.jsonl", "--seed", "-1"],
    ],
    ids=" ".join,
)
def test_usage_errors_end_with_2(words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "chat.yaml").write_text(
        yaml.safe_dump({"model_name_or_path": "m", "template": "deepseek", "use_kt": True})
    )
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 2, result.output


def test_json_goes_to_stdout_or_to_a_file(demo, tmp_path, monkeypatch):
    """With a file or without; a word that is the command's own is none."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(demo / "adapter", "adapter")

    def run(*words: str) -> str:
        result = CliRunner().invoke(app, ["inspect", *words])
        assert result.exit_code == 0, result.output
        return result.stdout

    printed = json.loads(run("adapter", "--json"))
    assert printed == json.loads(run("adapter", "--json", "-")) == json.loads(run("--json", "adapter"))
    assert "Format" in run("adapter", "--json", "figures.json")
    assert json.loads((tmp_path / "figures.json").read_text()) == printed
    assert "Format" in run("adapter", "--json=again.txt") and (tmp_path / "again.txt").is_file()


def test_a_configuration_is_not_overwritten(tmp_path, monkeypatch):
    """``doctor --json chat.yaml`` has always meant the configuration."""
    given = parsed("doctor --json chat.yaml kt_backend=INT4")
    assert (str(given["config"]), given["overrides"], str(given["json_file"])) == (
        "chat.yaml",
        ["kt_backend=INT4"],
        "-",
    )


def test_overrides_of_serve_stand_before_sglangs_options(standin):
    config, _ = standin()
    done = child(KT, "serve", config, "kt_num_threads=3", "--dry-run", "--", "--served-model-name", "a=b")
    assert done.returncode == 0, done.stderr
    assert "--kt-cpuinfer 3" in done.stdout and done.stdout.rstrip().endswith("--served-model-name a=b")


def test_an_output_is_replaced_only_if_it_is_one(tmp_path):
    from llamafactory_kt.ground.atomic_output import replacing
    from llamafactory_kt.ground.errors import KTAdapterError

    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("mine")
    with pytest.raises(KTAdapterError), replacing(out, "stats.json"):
        pass
    (out / "stats.json").write_text("{}")
    with replacing(out, "stats.json") as folder:
        folder.mkdir()
        (folder / "stats.json").write_text("[]")
    assert [file.name for file in out.iterdir()] == ["stats.json"] and (out / "stats.json").read_text() == "[]"
    (tmp_path / "empty").mkdir()
    with pytest.raises(KTAdapterError, match="is a directory, and a file is"), replacing(tmp_path / "empty") as file:
        file.write_text("x")
    (tmp_path / "empty").rmdir()
    assert list(tmp_path.iterdir()) == [out]


def test_piped_output_is_whole(demo, monkeypatch):
    """However narrow the terminal is said to be, and whoever asks for colors."""
    done = child(KT, "inspect", demo / "adapter", "--values", COLUMNS="40", FORCE_COLOR="1")
    assert done.returncode == 0 and "\x1b" not in done.stdout and "%|" not in done.stderr
    assert "r / alpha / scaling" in done.stdout and "most changed experts" in done.stdout
