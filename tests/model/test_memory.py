"""How much memory a model will take, computed from sizes alone."""

from __future__ import annotations

import pytest
import torch
from helpers.models import make_model
from transformers import AutoModelForCausalLM

from llamafactory_kt.checkpoint.discovery import find_experts
from llamafactory_kt.model.memory import read_around


@pytest.mark.parametrize("tied", [False, True])
def test_what_a_token_reads_around_the_experts(tmp_path, tied):
    """The products of calibration are as large. A tied embedding is read as the output layer."""
    path = make_model(tmp_path / "model", "qwen3_moe", tie_word_embeddings=tied)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
    parts = {name: parameter.nbytes for name, parameter in model.named_parameters()}
    read = [size for name, size in parts.items() if ".experts." not in name and (tied or "embed_tokens" not in name)]
    assert read_around(model, find_experts(model)) == sum(read)
    assert ("lm_head.weight" in parts) is not tied
