"""Adapter files with anything in them: one KTAdapterError, or an adapter that fits; never another exception, and never long."""

from __future__ import annotations

import json
import os

import pytest
import torch
from helpers.adapters import edit_adapter, make_adapter
from helpers.models import make_model
from safetensors.torch import load_file

from llamafactory_kt.adapters import AdapterSet, open_adapter
from llamafactory_kt.checkpoint.opening import open_checkpoint
from llamafactory_kt.ground.errors import KTAdapterError
from llamafactory_kt.tools.convert import convert_peft_to_kt_format

VALUES = [
    None, True, False, 0, 1, -1, 8, 2.5, 1e308, -1e308, float("nan"), float("inf"), 10**30, "", "8", "(a+)+$", "(", "pissa", [], [1], ["x"], [[]],
    {}, {"a": 1}, {"(": 1}, {"q_proj": -1}, {"q_proj": 1e308}, {"q_proj": "4"}, {"q_proj": [1]}, {"(q+)+x": 2}, "\x1b[2J\x07\n", "x" * 200_000,
]  # fmt: skip
KEYS = [
    "r", "lora_alpha", "use_rslora", "use_dora", "rank_pattern", "alpha_pattern", "target_modules", "modules_to_save", "bias", "lora_bias",
    "trainable_token_indices", "init_lora_weights", "peft_type", "task_type", "layers_to_transform", "layers_pattern", "exclude_modules",
    "target_parameters", "layer_replication", "megatron_core", "megatron_config", "use_qalora", "kasa_config", "base_model_name_or_path",
    "peft_version", "inference_mode", "fan_in_fan_out", "loftq_config", "auto_mapping", "revision", "ensure_weight_tying", "whatever",
]  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = make_model(tmp_path_factory.mktemp("model"), "qwen3_moe", num_hidden_layers=1)
    return path, open_checkpoint(path)


@pytest.fixture
def adapter(tmp_path, model):
    return make_adapter(tmp_path / "adapter", model[0], rank=4)


def fits(directory, model) -> str:
    """Nothing if it is opened and fits, else the error's message."""
    try:
        model[1].fit(AdapterSet((open_adapter(directory),)), finite=True)
    except KTAdapterError as error:
        message = str(error)
        assert len(message) < 10_000 and all(letter.isprintable() or letter == "\n" for letter in message)
        return message
    return ""


@pytest.mark.parametrize("key", KEYS)
def test_any_value_of_a_key(adapter, model, key):
    file = adapter / "adapter_config.json"
    config = json.loads(file.read_text())
    for value in VALUES:
        file.write_text(json.dumps({**config, key: value}))
        fits(adapter, model)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"r": 4, "r": 8}', "the key 'r' stands in it twice"),
        ('{"r": ' + "9" * 5000 + "}", "is not valid JSON"),
        ("[" * 100_000, "is nested too deeply"),
        ('{"a": ' * 50_000, "is nested too deeply"),
        ('{"r": 4, "lora_alpha": 1e999}', "lora_alpha: should be"),
        ("\udc80", "is not valid JSON"),
        (
            '{"rank_pattern": {"((.|.)(.|.))*[^a-z_.0-9]": 4}}',
            "a regular expression in rank_pattern takes more than 1 s",
        ),
        ('{"layer_replication": [[0, 4], [2, 5]]}', "layer_replication is set"),
        ('{"use_dora": true, "alora_invocation_tokens": [1]}', "alora_invocation_tokens is set"),
        ('{"modules_to_save": "lm_head"}', "modules_to_save: should be a valid list"),
    ],
)
def test_configuration(adapter, model, text, message):
    (adapter / "adapter_config.json").write_bytes(text.encode("utf-8", "surrogateescape"))
    assert message in fits(adapter, model)


@pytest.mark.parametrize("kind", ["directory", "pipe", "huge"])
def test_something_else_in_the_configurations_place(adapter, model, kind):
    file = adapter / "adapter_config.json"
    file.unlink()
    if kind == "directory":
        file.mkdir()
    elif kind == "pipe":
        os.mkfifo(file)
    else:
        with file.open("wb") as handle:
            handle.truncate(1 << 30)
    assert ("a file of settings has at most" if kind == "huge" else "no regular file") in fits(adapter, model)


NAME = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t | {NAME: t[NAME].to(torch.float8_e4m3fn)}, "1 of 44 tensors are F8_E4M3"),
        (lambda t: t | {NAME: t[NAME].to(torch.int8)}, "1 of 44 tensors are I8"),
        (lambda t: t | {NAME: t[NAME] > 0}, "1 of 44 tensors are BOOL"),
        (lambda t: t | {"a\x1b[2J": t[NAME].clone()}, "is no name of a tensor"),
        (lambda t: t | {"x" * 180_000: t[NAME].clone()}, "is no name of a tensor"),
        (lambda t: t | {NAME.replace(".weight", ".default.weight"): t[NAME].clone()}, "are the same weight"),
        (lambda t: t | {NAME: torch.zeros(())}, "has shape (); LoRA is A [r, in]"),
        (lambda t: t | {NAME: torch.zeros(0, 72)}, "1 of 44 tensors are empty"),
        (lambda t: t | {"base_model.model.model.layers.0.self_attn.q_proj": t[NAME].clone()}, "belong to no module"),
    ],
)
def test_tensors(adapter, model, change, message):
    edit_adapter(adapter, change)
    assert message in fits(adapter, model)


@pytest.mark.parametrize(
    "value",
    [
        torch.zeros(4, 72, dtype=torch.complex64), torch.zeros(4, 72).to_sparse(), torch.zeros(4, 72, device="meta"),
        torch.quantize_per_tensor(torch.zeros(4, 72), 0.1, 0, torch.qint8),
    ],
    ids=["complex", "sparse", "meta", "quantized"],
)  # fmt: skip
def test_pickled_tensors(adapter, model, value):
    tensors = load_file(adapter / "adapter_model.safetensors")
    (adapter / "adapter_model.safetensors").unlink()
    torch.save(tensors | {NAME: value}, adapter / "adapter_model.bin")
    assert fits(adapter, model)


def test_manifests_with_any_value(tmp_path, model, adapter):
    convert_peft_to_kt_format(adapter, tmp_path / "bundle", format="kt-bundle")
    file = tmp_path / "bundle" / "kt_adapter_manifest.json"
    manifest = json.loads(file.read_text())
    assert not fits(tmp_path / "bundle", model)
    for key in manifest:
        for value in VALUES:
            file.write_text(json.dumps({**manifest, key: value}))
            fits(tmp_path / "bundle", model)
    for value in VALUES:
        file.write_text(json.dumps({**manifest, "artifacts": {name: value for name in manifest["artifacts"]}}))
        fits(tmp_path / "bundle", model)
