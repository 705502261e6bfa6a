"""Anything in the place of an adapter's files, in them, or in the place of an adapter: one KTAdapterError that says what it is."""

from __future__ import annotations

import io
import json
import logging
import os
import shutil

import peft
import pytest
import torch
from helpers.adapters import edit_adapter, make_adapter
from helpers.foreign_adapters import peft_target_parameters
from helpers.models import make_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from llamafactory_kt import KTAdapterError, KTError, KTModelError, KTPathError
from llamafactory_kt.adapters import AdapterSet, open_adapter
from llamafactory_kt.adapters.inspection import inspect_adapter
from llamafactory_kt.adapters.location import locate_adapter
from llamafactory_kt.checkpoint.opening import open_checkpoint
from llamafactory_kt.tools.convert import convert_peft_to_kt_format
from llamafactory_kt.tools.merge import merge_adapter

TENSORS, INDEX, PICKLED = "adapter_model.safetensors", "adapter_model.safetensors.index.json", "adapter_model.bin"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("base"), "qwen3_moe", num_hidden_layers=1)


@pytest.fixture
def adapter(tmp_path, base):
    return make_adapter(tmp_path / "adapter", base, rank=4)


@pytest.mark.parametrize("kind", ["directory", "pipe", "link to nothing", "circle", "device"])
@pytest.mark.parametrize(
    "name",
    ["adapter_config.json", TENSORS, "moe_lora.pt", "fused_expert_lora.safetensors", "automodel_peft_config.json"],
)
def test_no_file_in_a_files_place(adapter, tmp_path, base, name, kind):
    """A part that cannot be read is not a part that is not there."""
    if name == "automodel_peft_config.json":  # read where shapes do not tell
        adapter, _ = peft_target_parameters(tmp_path, base, ["mlp.experts.down_proj"])
        edit_adapter(adapter, lambda t: {k: torch.zeros(72, 72) if "experts" in k else v for k, v in t.items()})
    file = adapter / name
    file.unlink(missing_ok=True)
    if kind == "directory":
        file.mkdir()
    elif kind == "pipe":
        os.mkfifo(file)
    else:
        file.symlink_to({"link to nothing": "nowhere", "circle": name, "device": "/dev/zero"}[kind])
    if name == "automodel_peft_config.json":
        from llamafactory_kt.adapters.provenance import peft_layout

        with pytest.raises(KTAdapterError, match=f"{name} is no regular file"):
            peft_layout(open_adapter(adapter).settings)
    else:
        with pytest.raises(KTAdapterError, match=f"{name} is no regular file, or a link to none"):
            open_adapter(adapter)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ('{"weight_map": {"a": 5}}', "weight_map must give each tensor's file"),
        ('{"weight_map": {"a": 5, "b": "s.safetensors"}}', "weight_map must give"),
        ('{"weight_map": {}}', "weight_map must give"),
        ('{"weight_map": ["s.safetensors"]}', "weight_map must give"),
        ('{"weight_map": null}', "weight_map must give"),
        ('{"weight_map": {"a": "../adapter/s.safetensors"}}', "which is not a file beside it"),
        ('{"weight_map": {"a": "' + "x" * 100_000 + '"}}', "which is not a file beside it"),
        ('{"weight_map": {"a": "\\ud800\\u0000"}}', "which is not a file beside it"),
        ('{"weight_map": {"nowhere": "s.safetensors"}}', "names nowhere, which no file beside it holds"),
        ("[" * 100_000, "is nested too deeply"),
        ('{"x": ' + "9" * 5000 + "}", "is not valid JSON"),
    ],
)
def test_indices(adapter, index, message):
    (adapter / TENSORS).rename(adapter / "s.safetensors")
    (adapter / INDEX).write_text(index)
    with pytest.raises(KTAdapterError, match=message) as caught:
        open_adapter(adapter)
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize("name", [5, None, ("a",), "layers.0." * 20_000 + "experts.x", "a\x07"])
def test_names_in_pickled_files(adapter, name):
    tensors = load_file(adapter / TENSORS)
    (adapter / TENSORS).unlink()
    torch.save({**tensors, name: torch.zeros(2)}, adapter / PICKLED)
    with pytest.raises(KTAdapterError, match=r"must hold named tensors|is no name of a tensor"):
        open_adapter(adapter)


def test_no_tensors(adapter):
    save_file({}, adapter / TENSORS)
    with pytest.raises(KTAdapterError, match="holds no tensors"):
        open_adapter(adapter)


def test_saved_by_zero_3(adapter):
    edit_adapter(adapter, lambda tensors: {name: torch.zeros(0) for name in tensors})
    with pytest.raises(KTAdapterError, match=r"of 44 tensors are empty.*ZeRO-3.*zero_to_fp32"):
        open_adapter(adapter)


@pytest.mark.parametrize("shape", [(), (3,), (1, 1), (2, 3, 4, 5), (5, 72), (72, 5), (0, 72), (6, 0, 4)])
@pytest.mark.parametrize("layout", ["projections", "all experts", "target_parameters", "bundle", "attention"])
def test_shapes_through_every_door(adapter, tmp_path, base, layout, shape):
    """inspect, convert and merge look at files that no model was compared with."""
    if layout == "all experts":
        edit_adapter(adapter, _together)
    elif layout == "target_parameters":
        adapter, _ = peft_target_parameters(tmp_path, base, ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"])
    elif layout == "bundle":
        convert_peft_to_kt_format(adapter, tmp_path / "bundle", format="kt-bundle")
        adapter = tmp_path / "bundle"
        (adapter / "kt_adapter_manifest.json").unlink()
    file = adapter / ("fused_expert_lora.safetensors" if layout == "bundle" else TENSORS)
    tensors = load_file(file)
    part = "attn" if layout == "attention" else "experts"
    for name in [
        next(name for name in tensors if part in name and side in name.lower()) for side in ("lora_a", "lora_b")
    ]:
        save_file({**tensors, name: torch.zeros(shape)}, file)
        for door in (
            lambda: inspect_adapter(open_adapter(adapter), values=True),
            lambda: convert_peft_to_kt_format(adapter, tmp_path / "out", format="peft"),
            lambda: convert_peft_to_kt_format(adapter, tmp_path / "out2", format="sglang-merged"),
            lambda: merge_adapter(base, adapter, tmp_path / "merged"),
        ):
            try:
                door()
            except KTError as error:
                assert adapter.name in str(error) or "sglang" in str(error)
        for out in ("out", "out2"):
            shutil.rmtree(tmp_path / out, ignore_errors=True)
        assert not (tmp_path / "merged").exists()


def _together(tensors):
    """A tensor of all experts for each projection."""
    found = {}
    for name, tensor in tensors.items():
        block, experts, rest = name.partition(".experts.")
        found.setdefault(f"{block}{experts}{rest.partition('.')[2]}", []).append(tensor)
    return {name: torch.stack(all_of_it) if ".experts." in name else all_of_it[0] for name, all_of_it in found.items()}


@pytest.mark.parametrize("value", [1e13, -3e38, 1e300, float("nan"), float("-inf")])
def test_values_that_overflow(adapter, base, value):
    def change(tensors):
        name = next(name for name in tensors if "experts.5.up_proj.lora_B" in name)
        tensors[name] = tensors[name].double()
        tensors[name][3, 2] = value
        return tensors

    edit_adapter(adapter, change)
    with pytest.raises(KTAdapterError, match=r"1 of 44 tensors hold NaN or Inf, first .*experts\.5\.up"):
        open_checkpoint(base).fit(AdapterSet((open_adapter(adapter),)), finite=True)


@pytest.mark.parametrize("prefix", ["talker.model", "model.visual", "mtp", "model.mtp", "x.layers.7"])
def test_experts_of_another_part(adapter, base, prefix):
    """Layer 0 of another part is not layer 0."""
    edit_adapter(
        adapter,
        lambda t: {
            k.replace("base_model.model.model.layers", f"base_model.model.{prefix}.layers") if "experts" in k else k: v
            for k, v in t.items()
        },
    )
    with pytest.raises(KTAdapterError, match="LoRA on experts in 1 layers that Qwen3MoeForCausalLM does not have"):
        open_checkpoint(base).fit(AdapterSet((open_adapter(adapter),)))


@pytest.mark.parametrize("prefix", ["", "model.", "model.language_model.", "language_model.model."])
def test_experts_by_other_names(adapter, base, prefix):
    edit_adapter(
        adapter,
        lambda t: {
            k.replace("base_model.model.model.layers", f"base_model.model.{prefix}layers"): v for k, v in t.items()
        },
    )
    open_checkpoint(base).fit(AdapterSet((open_adapter(adapter),)))


@pytest.mark.parametrize(
    ("kind", "keys", "message"),
    [
        ("IA3Config", {"feedforward_modules": []}, "Merge it into the model"),
        ("VeraConfig", {}, "Merge it into the model"),
        ("AdaLoraConfig", {"total_step": 10}, "Merge it into the model"),
        ("LoHaConfig", {}, "Merge it into the model"),
        ("PrefixTuningConfig", {"num_virtual_tokens": 4}, "It adds tokens to each prompt"),
    ],
)
def test_other_kinds_of_adapters(base, tmp_path, kind, keys, message):
    if "num_virtual_tokens" not in keys:
        keys = {"target_modules": ["q_proj", "v_proj"], **keys}
    config = getattr(peft, kind)(task_type="CAUSAL_LM", **keys)
    peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).save_pretrained(tmp_path / "other")
    with pytest.raises(KTAdapterError, match=f"peft_type must be LORA, found '{config.peft_type.value}': .*{message}"):
        open_adapter(tmp_path / "other")


def test_not_an_adapter(adapter, base):
    with pytest.raises(KTAdapterError, match="The directory holds a whole model, not an adapter"):
        open_adapter(base)
    with pytest.raises(KTAdapterError, match="There are adapters in its folders adapter: give one of them"):
        open_adapter(adapter.parent)


def test_adapter_in_the_models_directory(adapter, base, tmp_path):
    """transformers would apply all but the experts' part by itself."""
    from helpers.loading import load

    for file in base.iterdir():
        (tmp_path / "both").mkdir(exist_ok=True)
        (tmp_path / "both" / file.name).symlink_to(file)
    for file in adapter.iterdir():
        (tmp_path / "both" / file.name).symlink_to(file)
    for refused in (
        lambda: load(tmp_path / "both", "torch"),
        lambda: merge_adapter(tmp_path / "both", adapter, tmp_path / "merged"),
    ):
        with pytest.raises(
            KTModelError, match=r"holds an adapter .*: move the adapter's files to a directory of their own"
        ):
            refused()
    with pytest.raises(KTModelError, match="all of an adapter but its routed experts' part"):
        load(adapter, "torch")  # transformers takes the base's name from the configuration
    with pytest.raises(KTModelError, match="give this directory as adapter_name_or_path"):
        open_checkpoint(adapter)


@pytest.mark.parametrize("name", ["x" * 5000, "/tmp/" + "y" * 300, "a\0b", "~nobody-here/adapter"])
def test_paths_that_the_system_refuses(name):
    with pytest.raises(KTPathError, match="does not exist"):
        locate_adapter(name)
    with pytest.raises(KTPathError, match="does not exist"):
        open_adapter(name)


def test_mixed_dtypes_of_fused_weights(base, tmp_path):
    """B is not rounded to A's dtype."""
    from helpers.adapters import delta_of

    adapter, _ = peft_target_parameters(tmp_path, base, ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"])
    shape = open_checkpoint(base).shapes[0]
    edit_adapter(adapter, lambda t: {k: v.half().float() if "lora_A" in k else v * 1e-9 for k, v in t.items()})
    wanted = delta_of(open_adapter(adapter).read_layer(0, shape), "down", 2)
    edit_adapter(adapter, lambda t: {k: v.half() if "lora_A" in k else v for k, v in t.items()})
    assert torch.equal(delta_of(open_adapter(adapter).read_layer(0, shape), "down", 2), wanted) and wanted.any()


@pytest.mark.parametrize("wrong", [16, {"a": 1}, [5]])
def test_target_parameters_of_another_type(base, tmp_path, wrong):
    adapter, _ = peft_target_parameters(tmp_path, base, ["mlp.experts.down_proj"])
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "target_parameters": wrong}))
    with pytest.raises(KTAdapterError, match="target_parameters"):
        open_adapter(adapter)


def test_names_in_llamafactorys_log(monkeypatch):
    """Paths may hold what moves a terminal's cursor; a table's lines stay lines."""
    from llamafactory_kt.integration.model import loader

    ours, stock, stream = loader.logger, logging.getLogger("llamafactory"), io.StringIO()
    for logger, handlers in ((ours, ours.handlers), (stock, [logging.StreamHandler(stream)])):
        monkeypatch.setattr(logger, "handlers", handlers)
    monkeypatch.setattr(ours, "propagate", ours.propagate)
    monkeypatch.setattr(stock, "level", logging.INFO)
    loader._share_log()
    ours.info("Loading %s: 100%%\nand more", "ad\x1b[2Japter\r")
    stock.info("as it\x1bwas")
    assert stream.getvalue() == "Loading ad\\x1b[2Japter\\r: 100%\nand more\nas it\x1bwas\n"


def test_rows_that_the_file_does_not_have(base, tmp_path):
    adapter = make_adapter(tmp_path / "adapter", base, trainable_token_indices=[17])
    with pytest.raises(KTAdapterError, match=r"says that some tokens' embeddings .* was trained as a whole"):
        open_checkpoint(base).fit(AdapterSet((open_adapter(adapter),)))
