"""Adapter files: names, scaling, stacking, and everything that can be wrong with them."""

from __future__ import annotations

import json
import math
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import delta_of, edit_adapter, make_adapter, make_model, write_config

from llamafactory_kt.adapters import ExpertsShape, locate_adapter, open_adapter
from llamafactory_kt.adapters.keys import ExpertKey, parse_expert_key, split_module
from llamafactory_kt.ground.errors import KTAdapterError, KTPathError

SHAPE = ExpertsShape(num_experts=4, hidden_size=10, intermediate_size=6)
EXPERT = "base_model.model.model.layers.{layer}.mlp.experts.{expert}.{projection}_proj.lora_{side}.weight"


@pytest.mark.parametrize(
    ("key", "wanted"),
    [
        ("base_model.model.model.layers.1.mlp.original_moe.experts.5.gate_proj.lora_A.weight", (1, 5, "gate", "a")),
        ("base_model.model.model.layers.1.mlp.experts.5.gate_proj.lora_B.weight", (1, 5, "gate", "b")),
        ("model.layers.26.mlp.experts.63.down_proj.lora_B.default.weight", (26, 63, "down", "b")),
        ("model.layers.0.mlp.experts.7.up_proj.orig_module.lora_A.weight", (0, 7, "up", "a")),
        ("base_model.model.model.layers.3.block_sparse_moe.experts.2.w1.lora_A.weight", (3, 2, "gate", "a")),
        ("base_model.model.model.layers.3.block_sparse_moe.experts.2.w3.lora_A.weight", (3, 2, "up", "a")),
        ("base_model.model.model.layers.3.block_sparse_moe.experts.2.w2.lora_B.weight", (3, 2, "down", "b")),
        ("base_model.model.model.language_model.layers.4.mlp.experts.0.up_proj.lora_A.weight", (4, 0, "up", "a")),
        ("base_model.model.language_model.model.layers.4.mlp.experts.0.up_proj.lora_A.weight", (4, 0, "up", "a")),
        ("base_model.model.model.layers.1.mlp.shared_experts.gate_proj.lora_A.weight", None),
        ("base_model.model.model.layers.1.mlp.shared_experts.0.gate_proj.lora_A.weight", None),
        ("base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight", None),
        ("base_model.model.model.layers.1.mlp.experts.5.gate_proj.lora_magnitude_vector", None),
        ("base_model.model.model.layers.1.mlp.experts.5.gate_proj.lora_B.bias", None),
    ],
)
def test_expert_keys(key, wanted):
    assert parse_expert_key(key) == (ExpertKey(*wanted) if wanted else None)


@pytest.mark.parametrize(
    ("key", "wanted"),
    [
        ("base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight", ("model.layers.0.self_attn.q_proj", "lora_A.weight")),
        ("model.layers.0.self_attn.q_proj.lora_B.default.weight", ("model.layers.0.self_attn.q_proj", "lora_B.weight")),
        ("base_model.model.model.layers.0.mlp.gate_proj.lora_magnitude_vector", ("model.layers.0.mlp.gate_proj", "lora_magnitude_vector.weight")),
        ("base_model.model.model.embed_tokens.lora_embedding_A", ("model.embed_tokens", "lora_embedding_A")),
        ("base_model.model.lm_head.weight", ("lm_head", "weight")),
        ("base_model.model.model.layers.0.self_attn.q_proj.lora_B.bias", ("model.layers.0.self_attn.q_proj", "lora_B.bias")),
    ],
)  # fmt: skip
def test_module_names(key, wanted):
    assert split_module(key) == wanted


def experts_tensors(ranks, layers=(2,), dtype=torch.float32):
    """Random expert LoRA; ``ranks(expert, projection)`` gives the rank, 0 for none."""
    generator = torch.Generator().manual_seed(5)
    tensors = {}
    for layer in layers:
        for expert in range(SHAPE.num_experts):
            for projection in ("gate", "up", "down"):
                out, size = SHAPE.projection(projection)
                if rank := ranks(expert, projection):
                    for side, shape in (("A", (rank, size)), ("B", (out, rank))):
                        name = EXPERT.format(layer=layer, expert=expert, projection=projection, side=side)
                        tensors[name] = torch.randn(shape, generator=generator).to(dtype)
    return tensors


def save(directory: Path, tensors, **config) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    save_file(tensors, directory / "adapter_model.safetensors")
    write_config(directory, "base", **{"r": 3, "lora_alpha": 6, **config})
    return directory


def test_ranks_mixed_between_experts_and_projections(tmp_path):
    """Different ranks, experts and projections without LoRA: padded with zeros, scaled by their own rank, exactly."""
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


def test_folding_is_exact_for_powers_of_two_and_rounds_once_otherwise(tmp_path):
    from llamafactory_kt.adapters.expert_lora import mantissa

    tensors = experts_tensors(lambda e, p: 4 if e else 5, dtype=torch.bfloat16)
    lora = open_adapter(save(tmp_path, tensors, r=4, lora_alpha=24)).read_layer(2, SHAPE)
    common = mantissa(6.0)
    folded = lora.folded("gate", common)
    assert common == 1.5
    assert torch.equal(folded[1], 4 * lora.b["gate"][1].float())
    assert torch.allclose(folded[0], lora.b["gate"][0].float() * (24 / 5 / 1.5), rtol=1e-6)


def test_mixed_dtypes_become_float32(tmp_path):
    tensors = experts_tensors(lambda e, p: 3)
    name = next(iter(tensors))
    tensors[name] = tensors[name].half()
    lora = open_adapter(save(tmp_path, tensors)).read_layer(2, SHAPE)
    assert {t.dtype for t in (*lora.a.values(), *lora.b.values())} == {torch.float32}


def broken(tmp_path, change=None, tensors=None, **config):
    directory = save(tmp_path / "broken", experts_tensors(lambda e, p: 3) if tensors is None else tensors, **config)
    return edit_adapter(directory, change) if change else directory


def renamed(old, new):
    return lambda tensors: {name.replace(old, new): tensor for name, tensor in tensors.items()}


FIRST = EXPERT.format(layer=2, expert=0, projection="gate", side="A")


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


def test_files_that_are_not_safetensors(tmp_path):
    directory = broken(tmp_path)
    file = directory / "adapter_model.safetensors"
    whole = file.read_bytes()
    for damaged in (whole[: len(whole) // 2], whole[:4], b"", b"{}" * 50, b"\xff" * 4096):
        file.write_bytes(damaged)
        with pytest.raises(KTAdapterError, match="cannot be read as safetensors"):
            open_adapter(directory)
    torch.save({"a": torch.ones(2)}, file)  # a torch file under this name
    with pytest.raises(KTAdapterError, match="another format under this name"):
        open_adapter(directory)


class Hostile:
    def __reduce__(self):
        import os

        return os.system, ("touch hostile-code-was-run",)


def test_pickled_adapter_is_read_without_running_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    directory = broken(tmp_path)
    tensors = load_file(directory / "adapter_model.safetensors")
    (directory / "adapter_model.safetensors").unlink()
    torch.save(tensors, directory / "adapter_model.bin")
    lora = open_adapter(directory).read_layer(2, SHAPE)
    assert torch.equal(lora.a["gate"][0], tensors[FIRST])
    for payload in (Hostile(), {"a": Hostile()}, {"a": 1}, [torch.ones(1)]):
        torch.save(payload, directory / "adapter_model.bin")
        with pytest.raises(KTAdapterError, match=r"adapter_model\.bin"):
            open_adapter(directory)
    (directory / "adapter_model.bin").write_bytes(pickle.dumps(Hostile()))
    with pytest.raises(KTAdapterError, match="cannot be read safely"):
        open_adapter(directory)
    assert not (tmp_path / "hostile-code-was-run").exists()


def test_sharded_adapter(tmp_path):
    tensors = experts_tensors(lambda e, p: 3)
    directory = save(tmp_path, tensors)
    (directory / "adapter_model.safetensors").unlink()
    names = list(tensors)
    parts = {
        "adapter_model-00001-of-00002.safetensors": names[:7],
        "adapter_model-00002-of-00002.safetensors": names[7:],
    }
    for file, part in parts.items():
        save_file({name: tensors[name] for name in part}, directory / file)
    index = {"weight_map": {name: file for file, part in parts.items() for name in part}}
    index_file = directory / "adapter_model.safetensors.index.json"
    index_file.write_text(json.dumps(index))
    adapter = open_adapter(directory)
    assert sorted(adapter.expert_names) == sorted(tensors)
    index["weight_map"][names[0]] = "../../etc/passwd"
    index_file.write_text(json.dumps(index))
    with pytest.raises(KTAdapterError, match="not a file beside it"):
        open_adapter(directory)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "is missing: rank and lora_alpha"),
        ("{", "is not valid JSON"),
        ("[]", "peft_type must be LORA"),
        ('{"peft_type": "LOHA"}', "peft_type must be LORA"),
        ('{"r": 0}', "r must be a positive whole number"),
        ('{"lora_alpha": "x", "rank_pattern": [1]}', "lora_alpha must be a number, found 'x'; rank_pattern must map"),
    ],
)
def test_broken_config(tmp_path, text, message):
    directory = broken(tmp_path)
    (directory / "adapter_config.json").unlink()
    if text is not None:
        (directory / "adapter_config.json").write_text(text)
    with pytest.raises(KTAdapterError) as error:
        open_adapter(directory)
    assert message in str(error.value)


def test_links_in_an_adapter_directory(tmp_path):
    """The hub's cache is made of links to files; links to nothing, to a directory or in a circle are one clear error."""
    tensors = experts_tensors(lambda e, p: 3)
    real = save(tmp_path / "blobs", tensors)
    linked = tmp_path / "snapshot"
    linked.mkdir()
    for file in real.iterdir():
        (linked / file.name).symlink_to(file)
    assert sorted(open_adapter(linked).expert_names) == sorted(tensors)
    (tmp_path / "link").symlink_to(linked)
    assert open_adapter(tmp_path / "link").layers == [2]
    file = linked / "adapter_model.safetensors"
    for target in ("nowhere", tmp_path, file):
        file.unlink()
        file.symlink_to(target)
        with pytest.raises(KTAdapterError, match=r"holds no adapter_model\.safetensors .* it holds "):
            open_adapter(linked)


def test_adapter_without_experts_is_no_error(tmp_path):
    model = make_model(tmp_path / "model", "qwen3_moe")
    adapter = open_adapter(make_adapter(tmp_path / "adapter", model, skip_layers=(0, 1, 2)))
    assert adapter.layers == [] and adapter.expert_names == [] and adapter.other_names


def test_paths(tmp_path, monkeypatch):
    directory = broken(tmp_path)
    assert locate_adapter(str(directory)) == directory
    assert locate_adapter(str(tmp_path), subfolder="broken") == directory
    for name, message in (
        (str(tmp_path / "none"), "does not exist"),
        (str(directory / "adapter_config.json"), "is a file"),
    ):
        with pytest.raises(KTPathError, match=message):
            locate_adapter(name)
    with pytest.raises(KTPathError, match="does not exist"):
        open_adapter(tmp_path / "none")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "saves").mkdir()
    with pytest.raises(KTPathError, match="does not exist"):  # below a directory that exists: never asked of the hub
        locate_adapter("saves/mistyped")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(KTPathError, match="neither a local directory nor an adapter that could be fetched"):
        locate_adapter("someone/adapter", cache_dir=str(tmp_path / "cache"))


def test_hub_id_is_taken_from_the_cache_like_llamafactory_does(tmp_path, monkeypatch):
    """A repository as huggingface_hub caches it, found offline by its id."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    repository = tmp_path / "cache" / "models--someone--adapter"
    commit = "0" * 40
    save(repository / "snapshots" / commit, experts_tensors(lambda e, p: 3))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    assert open_adapter(locate_adapter("someone/adapter", cache_dir=str(tmp_path / "cache"))).layers == [2]
