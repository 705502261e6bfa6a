"""A model's state is true after every switch of adapters, and loading a model leaves the rest of the process alone."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from helpers.adapters import make_adapter
from helpers.models import make_model
from transformers import AutoModelForCausalLM

from llamafactory_kt import (
    KTAdapterError,
    KTExpertsConfig,
    KTModelError,
    apply_adapter,
    load_moe_lora_from_adapter,
    switch_adapter,
)
from llamafactory_kt.load_report import load_rows
from llamafactory_kt.model.state import has_kt_experts, kt_state


def load(path, **keys):
    config = KTExpertsConfig(backend="torch", **keys)
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, quantization_config=config)


def names(adapters) -> list[str]:
    return [adapter.directory.name for adapter in adapters.adapters]


def test_the_state_follows_every_exchange(tmp_path):
    path = make_model(tmp_path / "model", "qwen3_moe")
    one = make_adapter(tmp_path / "one", path, rank=4)
    two = make_adapter(tmp_path / "two", path, rank=6, skip_layers=(1,))
    state = kt_state(model := load(path, adapter=[str(one)]))
    assert names(state.requested) == ["one"] and not state.adapters.adapters and state.report is None
    wrapped, report = apply_adapter(model, one)
    assert kt_state(wrapped) is state and has_kt_experts(wrapped)
    assert names(state.adapters) == names(state.expert_adapters) == ["one"] and state.report == report
    switch_adapter(wrapped, two)
    assert names(state.adapters) == ["two"] and state.report.max_rank == 6 and len(state.report.layers) == 2
    with pytest.raises(KTAdapterError):
        switch_adapter(wrapped, make_adapter(tmp_path / "other", make_model(tmp_path / "m2", "olmoe")))
    assert names(state.adapters) == ["two"], "a failure changes nothing"
    load_moe_lora_from_adapter(wrapped, one)
    assert names(state.adapters) == ["two"] and names(state.expert_adapters) == ["one"]
    assert state.report.max_rank == 4 and state.report.adapter.endswith(f"experts of {one}")
    assert dict(load_rows(wrapped))["LoRA layers"] == "3 with expert LoRA, rank up to 4"
    load_moe_lora_from_adapter(wrapped, [])
    assert state.report.adapter == f"{two}, experts of none" and state.report.experts == 0
    load_moe_lora_from_adapter(wrapped, two)
    assert state.report.adapter == str(two) and str(state.report).startswith(f"consumed {state.report.total} of")
    switch_adapter(wrapped, None)
    assert not state.adapters.adapters and not state.expert_adapters.adapters and state.report is None
    assert dict(load_rows(wrapped))["LoRA tensors"] == "no adapter"


def test_experts_alone(tmp_path):
    """Without an adapter around them, the report is that of the experts' adapter, and goes with it."""
    path = make_model(tmp_path / "model", "qwen3_moe")
    model = load(path)
    load_moe_lora_from_adapter(model, make_adapter(tmp_path / "one", path))
    assert kt_state(model).report.experts > 0
    load_moe_lora_from_adapter(model, [])
    assert kt_state(model).report is None


def test_other_models_have_none(tmp_path):
    stock = AutoModelForCausalLM.from_pretrained(make_model(tmp_path / "model", "mixtral"))
    assert not has_kt_experts(stock) and not has_kt_experts(None)
    with pytest.raises(KTModelError, match="MixtralForCausalLM has no KT experts"):
        kt_state(stock)


UNTOUCHED = """
import os, sys, torch
from transformers import AutoModelForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers import AttentionInterface

def facts():
    return {
        "threads": torch.get_num_threads(), "interop": torch.get_num_interop_threads(),
        "cudnn attention": torch.backends.cuda.cudnn_sdp_enabled(), "grad": torch.is_grad_enabled(),
        "dtype": torch.get_default_dtype(), "class": os.sched_getscheduler(0), "affinity": os.sched_getaffinity(0),
        "environment": dict(os.environ), "sdpa": AttentionInterface()["sdpa"] is sdpa_attention_forward,
        "attentions": sorted(AttentionInterface().valid_keys()),
    }

before = facts()
from llamafactory_kt import KTExpertsConfig
config = KTExpertsConfig(backend=sys.argv[2], num_threads=1 if sys.argv[2].startswith("AMX") else None)
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], quantization_config=config)
model.generate(torch.arange(3, 9)[None], max_new_tokens=2)
after = facts()
changed = {name: (before[name], after[name]) for name in before if before[name] != after[name]}
assert not changed, changed
from llamafactory_kt import configure_process
print(configure_process(model)[0])
"""


@pytest.mark.parametrize("backend", ["torch", "native", "oneDNN", "auto"])
def test_loading_leaves_the_process_alone(demo, backend):
    """What the process is like is asked for by name."""
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    words = [sys.executable, "-c", UNTOUCHED, str(demo / "model"), backend]
    result = subprocess.run(words, capture_output=True, text=True, env=environment, timeout=300)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("threads of this process: ")
