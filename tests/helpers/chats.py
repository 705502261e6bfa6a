"""LLaMA-Factory's chats, as ``llamafactory-cli chat`` in a process of its own or as a ChatModel in this one; and the
answers of the demo."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import yaml

from . import children
from .children import child
from .places import CLI, DEMO

CONVERSATIONS = json.loads((DEMO / "conversations.json").read_text(encoding="utf-8"))
PROMPTS = ["你好，请介绍一下你自己。", "什么是 LoRA？", "Hello, who are you?", "Tell me a joke."]
EXPECTED = {item["prompt"]: item for item in CONVERSATIONS}


def config(directory: Path, demo: Path, **keys) -> Path:
    """Write the README's YAML with the demo's paths. It asks for 60 threads, more than small machines have."""
    values = {
        "model_name_or_path": str(demo / "model"),
        "template": "deepseek",
        "trust_remote_code": True,
        "infer_backend": "huggingface",
        "use_kt": True,
        "kt_backend": "AMXBF16",
        "kt_num_threads": 60,
        "kt_tp_enabled": False,
        "do_sample": False,
        **keys,
    }
    path = directory / "config.yaml"
    path.write_text(yaml.safe_dump({k: v for k, v in values.items() if v is not None}, allow_unicode=True), "utf-8")
    return path


def chat(path: Path, lines: list[str], *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    environment = {"LLAMAFACTORY_VERBOSITY": "INFO", **environment}
    return child(children.CLI, "chat", path, *arguments, stdin="\n".join(lines) + "\n", **environment)


def chat_from_the_start(path: Path, lines: list[str]) -> subprocess.CompletedProcess:
    """The same by the command itself, in an interpreter that has imported nothing."""
    env = {**os.environ, "LLAMAFACTORY_VERBOSITY": "INFO", "PYTHONIOENCODING": "utf-8"}
    text = "\n".join(lines) + "\n"
    return subprocess.run([CLI, "chat", path], input=text, capture_output=True, encoding="utf-8", env=env, timeout=300)


def answers(result: subprocess.CompletedProcess) -> list[str]:
    turns = result.stdout.split("\nUser: ")[1:]
    return [turn.removeprefix("Assistant: ").strip() for turn in turns if turn.startswith("Assistant: ")]


def chat_model(model: Path, adapter: Path | None = None, **keys):
    """LLaMA-Factory's ChatModel, with KT experts."""
    from llamafactory.chat import ChatModel

    values = {"model_name_or_path": str(model), "template": "deepseek", "use_kt": True, "do_sample": False}
    if adapter is not None:
        values["adapter_name_or_path"] = str(adapter)
    return ChatModel({**values, **keys})
