"""PEFT's target_parameters, in the layouts of several PEFT versions, compared with PEFT's own forward."""

from __future__ import annotations

import json
from pathlib import Path

import peft
import pytest
from helpers.foreign_adapters import (
    TARGETS,
    ours,
    peft_target_parameters,
    stock,
)
from helpers.loading import logits
from helpers.models import make_model
from helpers.references import rel
from packaging.version import Version
from peft import PeftModel
from safetensors.torch import load_file, save_file

from llamafactory_kt import KTAdapterError

needs_0_18 = pytest.mark.skipif(
    Version(peft.__version__) >= Version("0.19"), reason="only PEFT 0.18 reads and writes this orientation"
)


@needs_0_18
def test_target_parameters_of_peft():
    """Trained with PEFT 0.18.1 and compared with PEFT's own forward."""
    model, report = ours(TARGETS)
    reference = PeftModel.from_pretrained(stock(), TARGETS)
    assert rel(logits(reference), logits(stock())) > 0.01
    assert rel(logits(model), logits(reference)) < 2e-5
    assert rel(logits(model), logits(reference.merge_and_unload())) < 2e-5
    assert report.total == report.experts + report.peft and report.experts == 3 * 4


@pytest.mark.parametrize(
    ("intermediate", "targets", "config"),
    [
        (40, ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"], {"use_rslora": True}),
        (40, ["mlp.experts.down_proj"], {}),
        (40, ["mlp.experts.gate_up_proj"], {}),
        (36, ["mlp.experts.gate_up_proj"], {}),  # 2 I = H: only the recorded version tells
        (36, ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"], {}),  # 2 I = H: the other pair tells
        (40, ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"], {"rank_pattern": {r"experts\.down_proj": 5}, "alpha_pattern": {r"layers\.1\.mlp\.experts\.gate_up_proj": 2}}),
    ],
)  # fmt: skip
def test_target_parameters_in_all_forms(tmp_path, intermediate, targets, config):
    base = make_model(tmp_path / "m", "qwen3_moe", moe_intermediate_size=intermediate)
    adapter, reference = peft_target_parameters(tmp_path, base, targets, **config)
    assert rel(logits(reference), logits(stock(base))) > 0.05
    assert rel(logits(ours(adapter, base)[0]), logits(reference)) < 2e-5


@pytest.mark.parametrize("kind", ["rank_pattern", "alpha_pattern"])
def test_patterns_are_about_the_parameter(tmp_path, kind):
    """``mlp.gate.weight``, not ``mlp.gate``; a module with LoRA of its own goes by its name."""
    base = make_model(tmp_path / "m", "qwen3_moe", num_hidden_layers=2)
    targets = ["mlp.gate.weight", "self_attn.o_proj.weight"]
    pattern = {
        "mlp.gate": 5,
        "o_proj": 6,
        "self_attn.o_proj.weight": 2,
        "q_proj": 1,
        r"layers\.1\.mlp\.gate\.weight": 4,
    }
    adapter, reference = peft_target_parameters(tmp_path, base, targets, **{kind: pattern})
    assert rel(logits(reference), logits(stock(base))) > 0.05
    assert rel(logits(ours(adapter, base)[0]), logits(reference)) < 2e-5


def swap_orientation(adapter: Path, experts: int, version: str):
    """What PEFT 0.19 would have written for the same weights: A on the input side."""
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    out = dict(tensors)
    for name, a in tensors.items():
        if ".experts." in name and "lora_A" in name:
            other = name.replace("lora_A", "lora_B")
            rank = a.shape[0] // experts
            rows = tensors[other].unflatten(1, (rank, experts)).permute(2, 1, 0).flatten(0, 1)  # [E * r, in]
            columns = a.unflatten(0, (experts, rank)).permute(2, 1, 0).flatten(1)  # [out, r * E]
            out[name], out[other] = rows.contiguous(), columns.contiguous()
    save_file(out, file)
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "peft_version": version}))


@needs_0_18
@pytest.mark.parametrize("intermediate", [40, 36])
@pytest.mark.parametrize(
    "targets", [["mlp.experts.gate_up_proj"], ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]], ids=len
)
def test_target_parameters_of_later_peft(tmp_path, intermediate, targets):
    base = make_model(tmp_path / "m", "qwen3_moe", moe_intermediate_size=intermediate)
    adapter, reference = peft_target_parameters(tmp_path, base, targets)
    swap_orientation(adapter, experts=6, version="0.19.0")
    assert rel(logits(ours(adapter, base)[0]), logits(reference)) < 2e-5
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "peft_version": None}))
    if intermediate == 36 and len(targets) == 1:
        with pytest.raises(KTAdapterError, match="the shapes do not tell which way round the LoRA lies"):
            ours(adapter, base)
    else:
        assert rel(logits(ours(adapter, base)[0]), logits(reference)) < 2e-5
