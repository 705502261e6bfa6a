"""sglang-kt itself: its options, and whether it accepts our commands and adapters."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
from helpers.sglang import (
    SGLANG_CONTRACT,
    experts_only,
    install_sglang_kt,
    interpreter,
    rest_only,
)
from safetensors.torch import load_file

from llamafactory_kt.serving.options import discover

CONTRACT = """
import argparse, json, sys
from sglang.srt import server_args
from sglang.srt.server_args import ServerArgs
parser = argparse.ArgumentParser()
ServerArgs.add_cli_args(parser)
answers = []
for words in json.load(sys.stdin):
    arguments = parser.parse_args(words)
    args = object.__new__(ServerArgs)  # __init__ looks for GPUs
    args.__dict__.update({name: field.default for name, field in ServerArgs.__dataclass_fields__.items()})
    args.__dict__.update(vars(arguments))
    try:
        args._validate_kt_expert_lora_max_running_requests()
        args.check_lora_server_args()
        split = None
        if args.lora_paths:
            split = [args.kt_expert_lora_path, args.lora_paths[0].lora_path]
        answers.append({"error": None, "cuda_graph_off": args.disable_cuda_graph, "experts": args.kt_expert_lora_path,
            "split": split, "required": args.kt_composite_lora_name})
    except Exception as error:
        answers.append({"error": str(error)})
print("\\nANSWERS " + json.dumps(answers))
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> tuple[Path, str | None]:
    """A directory for sglang-kt 0.7.2, and the reason if it could not be installed there."""
    target = tmp_path_factory.mktemp("sglang-kt")
    return target, install_sglang_kt(target)


@pytest.fixture
def sglang_kt(installed, record_property) -> Path:
    """sglang-kt itself. Without it, other tests rely on its recorded options alone; the summary says which it was."""
    target, reason = installed
    record_property(SGLANG_CONTRACT, "its recorded options alone" if reason else "sglang-kt 0.7.2 itself")
    if reason:
        pytest.skip(f"sglang-kt 0.7.2 could not be installed, only its recorded options were used: {reason}")
    return target


def test_recorded_facts_are_sglang_kts(sglang_kt, tmp_path, recorded):
    found = discover(str(interpreter(tmp_path, sglang_kt)))
    assert found.version == recorded.version and found.architectures == recorded.architectures
    assert found.options == recorded.options


def test_sglang_kt_takes_our_commands_and_adapters(sglang_kt, tmp_path, build, adapter, monkeypatch):
    """Its own parser, validators and splitter accept a matrix of configurations, and refuse what we refuse."""
    monkeypatch.setenv("SGLANG_KT_LORA_CACHE_DIR", str(tmp_path / "split"))
    experts, rest = experts_only(tmp_path / "e", adapter), rest_only(tmp_path / "r", adapter)
    weights = tmp_path / "int4 weights"
    weights.mkdir()
    plain = build(kt_backend="AMXINT4", kt_weight_path=str(weights), kt_gpu_experts_ratio=0.25)
    alone = build(adapter_name_or_path=str(experts), kt_backend="AMXBF16")
    whole = build(adapter_name_or_path=str(adapter), kt_cpuinfer=8, kt_threadpool_count=1)
    other = build(adapter_name_or_path=str(rest))
    few = [*alone.arguments, "--max-running-requests", "1"]
    raw = [*alone.arguments, "--kt-expert-lora-path", str(adapter)]
    commands = [c.arguments for c in (plain, alone, whole, other)]
    result = subprocess.run(
        [interpreter(tmp_path, sglang_kt), "-c", CONTRACT],
        input=json.dumps([*commands, few, raw]),
        capture_output=True,
        text=True,
    )
    answers = json.loads(result.stdout.rpartition("ANSWERS ")[2])
    assert [answer["error"] for answer in answers[:4]] == [None] * 4, result.stderr
    assert [answer["cuda_graph_off"] for answer in answers[:4]] == [False, True, True, False]
    assert [answer["required"] for answer in answers[:4]] == [None, None, "lora0", None]
    assert [c.adapter.required for c in (plain, alone, whole, other)] == [False, False, True, False]
    assert answers[1]["experts"] == alone.parsed.kt_expert_lora_path and answers[3]["experts"] is None
    ours = load_file(Path(whole.parsed.lora_paths[0].partition("=")[2]) / "adapter_model.safetensors")
    expert_part, rest_part = (load_file(Path(part) / "adapter_model.safetensors") for part in answers[2]["split"])
    assert set(expert_part) == {name for name in ours if ".mlp.experts." in name} and len(expert_part) == 2 * 6 * 3 * 2
    assert {**expert_part, **rest_part}.keys() == ours.keys() and rest_part
    assert "--max-running-requests >= 2" in answers[4]["error"]
    assert "non-expert LoRA tensors" in answers[5]["error"]
