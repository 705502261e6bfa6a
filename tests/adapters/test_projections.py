"""LoRA with separate tensors for each expert: ranks, scaling, and everything that can be wrong with them."""

from __future__ import annotations

import math

import pytest
import torch
from helpers.adapters import delta_of, make_adapter, write_config
from helpers.expert_tensors import EXPERT, FIRST, SHAPE, broken, experts_tensors, save
from helpers.models import make_model, moe_layers
from safetensors.torch import load_file, save_file

from llamafactory_kt import KTAdapterError
from llamafactory_kt.adapters import ExpertsShape, open_adapter


def test_ranks_mixed_between_experts_and_projections(tmp_path):
    """Different ranks, and experts and projections without LoRA: padded with zeros and scaled by their own rank,
    exactly."""
    tensors = experts_tensors(lambda expert, p: {0: 3, 1: 5, 2: 0, 3: 1 if p != "up" else 0}[expert])
    adapter = open_adapter(save(tmp_path, tensors, rank_pattern={r"experts\.1\.\w+": 5, r"experts\.3\.\w+": 1}))
    lora = adapter.read_layer(2, SHAPE)
    assert lora.rank == 5 and adapter.layers == [2]
    for expert in range(4):
        for projection in ("gate", "up", "down"):
            names = [EXPERT.format(layer=2, expert=expert, projection=projection, side=side) for side in "AB"]
            wanted = torch.zeros(SHAPE.projection(projection), dtype=torch.float64)
            if names[0] in tensors:
                a, b = tensors[names[0]].double(), tensors[names[1]].double()
                wanted = 6 / a.shape[0] * (b @ a)
            assert torch.allclose(delta_of(lora, projection, expert), wanted, rtol=1e-12, atol=1e-12)


def test_scaling_follows_rslora_and_patterns(tmp_path):
    tensors = experts_tensors(lambda e, p: 4)
    config = {
        "r": 4,
        "lora_alpha": 10,
        "use_rslora": True,
        "alpha_pattern": {"model.layers.2.mlp.experts.1.up_proj": 3},
    }
    lora = open_adapter(save(tmp_path, tensors, **config)).read_layer(2, SHAPE)
    assert lora.scaling["gate"][:, 0].tolist() == [10 / math.sqrt(4)] * 4
    assert lora.scaling["up"][:, 0].tolist() == [5.0, 1.5, 5.0, 5.0]


def test_ranks_other_than_the_config_says_are_said_aloud(tmp_path, kt_log):
    open_adapter(save(tmp_path, experts_tensors(lambda e, p: 3 if e else 2)))
    assert "3 of 12 expert modules have another rank than adapter_config.json says" in kt_log.text


def test_mixed_dtypes_become_float32(tmp_path):
    tensors = experts_tensors(lambda e, p: 3)
    name = next(iter(tensors))
    tensors[name] = tensors[name].half()
    lora = open_adapter(save(tmp_path, tensors)).read_layer(2, SHAPE)
    assert {t.dtype for t in (*lora.a.values(), *lora.b.values())} == {torch.float32}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: {k: v for k, v in t.items() if k != FIRST}, "has no lora_A beside it"),
        (lambda t: {**t, FIRST: t[FIRST][:2].clone()}, "layer 2, expert 0, gate_proj: lora_A has shape (2, 10) and lora_B (6, 3)"),
        (lambda t: {**t, FIRST.replace("lora_A.weight", "lora_magnitude_vector"): torch.ones(6)}, "DoRA magnitudes and LoRA biases"),
        (lambda t: {**t, FIRST.replace("lora_A.weight", "lora_B.bias"): torch.ones(6)}, "DoRA magnitudes and LoRA biases"),
        (lambda t: {**t, FIRST.replace(".mlp.", ".mlp.original_moe."): t[FIRST].clone()}, "are the same expert's tensor"),
        (lambda t: {**t, FIRST: t[FIRST].reshape(3, 2, 5)}, "lora_A has shape (3, 2, 5)"),
    ],
)  # fmt: skip
def test_broken_expert_tensors(tmp_path, change, message):
    with pytest.raises(KTAdapterError) as error:
        open_adapter(broken(tmp_path, change))
    assert message in str(error.value) and "adapter_model.safetensors" in str(error.value)


def test_dora_in_the_config(tmp_path):
    with pytest.raises(KTAdapterError, match="use_dora on routed experts"):
        open_adapter(broken(tmp_path, use_dora=True))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite(tmp_path, value):
    def spoil(tensors):
        for name in (FIRST, FIRST.replace("experts.0", "experts.3")):
            tensors[name][0, 0] = value
        return tensors

    with pytest.raises(KTAdapterError, match="2 of 24 tensors hold NaN or Inf") as error:
        open_adapter(broken(tmp_path, spoil)).check_finite()
    assert FIRST in str(error.value)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({0: SHAPE, 1: SHAPE}, "layer 2 has expert LoRA, but the model's layers with routed experts are 0, 1"),
        ({2: ExpertsShape(3, 10, 6)}, "layer 2, expert 3, gate_proj: the model has 3 experts"),
        (
            {2: ExpertsShape(4, 12, 6)},
            "layer 2, expert 0, gate_proj: LoRA for a weight of 6 x 10, the model's is 6 x 12",
        ),
        (
            {2: ExpertsShape(4, 10, 5)},
            "layer 2, expert 0, gate_proj: LoRA for a weight of 6 x 10, the model's is 5 x 10",
        ),
    ],
)
def test_adapter_of_another_model(tmp_path, shapes, message):
    with pytest.raises(KTAdapterError) as error:
        open_adapter(broken(tmp_path)).check_fits(shapes)
    assert message in str(error.value) and "trained for base" in str(error.value)


def test_adapter_without_experts_is_no_error(tmp_path):
    model = make_model(tmp_path / "model", "qwen3_moe")
    adapter = open_adapter(make_adapter(tmp_path / "adapter", model, skip_layers=(0, 1, 2)))
    assert adapter.layers == [] and adapter.expert_names == [] and adapter.other_names


def test_sglang_directory(tmp_path):
    """Expert keys only, without PEFT's prefix, are read as the per-expert layout they are."""
    base = make_model(tmp_path / "m", "qwen3_moe")
    whole = load_file(make_adapter(tmp_path / "a", base, rank=4) / "adapter_model.safetensors")
    directory = tmp_path / "sglang"
    directory.mkdir()
    save_file(
        {n.removeprefix("base_model.model."): t for n, t in whole.items() if ".experts." in n},
        directory / "adapter_model.safetensors",
    )
    write_config(directory, base, r=4, lora_alpha=16, target_modules=["gate_proj", "up_proj", "down_proj"])
    layer, (_, experts, hidden, intermediate) = next(iter(moe_layers(base).items()))
    shape = ExpertsShape(experts, hidden, intermediate)
    found, wanted = (
        open_adapter(directory).read_layer(layer, shape),
        open_adapter(tmp_path / "a").read_layer(layer, shape),
    )
    assert all(
        torch.equal(found.a[p], wanted.a[p]) and torch.equal(found.b[p], wanted.b[p]) for p in ("gate", "up", "down")
    )
