"""Image-text models on a prompt with pictures: their logits, and the effect of LoRA on vision tower, projector, text and experts, compared
with stock transformers given the processor's own inputs.

The bound is the error of stock transformers in bfloat16, measured in the same test.
"""

from __future__ import annotations

import pytest
import torch
from helpers.adapters import edit_adapter, make_adapter, write_config
from helpers.image_text import ARCHITECTURES, make_image_text_model, picture, prompt
from helpers.references import merged_float32, per_token, rel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor

from llamafactory_kt import KTAdapterError, KTExpertsConfig, apply_adapter, optimize_for_inference, switch_adapter
from llamafactory_kt.checkpoint.opening import open_checkpoint
from llamafactory_kt.tools.merge import merge_adapter


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    made = {}

    def get(name: str, dtype=torch.float32):
        if (name, dtype) not in made:
            made[name, dtype] = make_image_text_model(tmp_path_factory.mktemp(name), name, dtype=dtype)
        return made[name, dtype]

    return get


def inputs(path, name):
    """Two pictures in one message, and a turn after it."""
    text = prompt(name, "<image>What is it, and <image>?", "A cat.", "Which one?")
    return AutoProcessor.from_pretrained(path)(text=[text], images=[picture(), picture(64, 48, 1)], return_tensors="pt")


@torch.inference_mode()
def logits(model, given) -> torch.Tensor:
    return model(**given).logits.float()


def load(path, dtype, **keys):
    model = AutoModelForImageTextToText.from_pretrained(
        path, dtype=dtype, quantization_config=KTExpertsConfig(backend="torch", **keys)
    )
    optimize_for_inference(model)
    return model


def naming(change):
    """Rename an adapter's modules."""
    return lambda tensors: {change(name): tensor for name, tensor in tensors.items()}


def in_text_class(name: str) -> str:
    return name.replace(".language_model.", ".")


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_pictures_and_lora_everywhere(models, tmp_path, name):
    path = models(name, torch.bfloat16)
    adapter = make_adapter(tmp_path / "a", path, rank=5, alpha=10)
    given, dtypes = inputs(path, name), (torch.float32, torch.bfloat16)
    modules = {tensor.split(".lora_")[0] for tensor in load_file(adapter / "adapter_model.safetensors")}
    tower, projector = ("vision_tower", "embed_vision") if name == "gemma4" else ("visual.blocks", "visual.merger")
    for part in (tower, projector, "self_attn", ".experts."):
        assert any(part in module for module in modules), part
    wanted = {on: logits(merged_float32(path, adapter if on else None), given) for on in (True, False)}
    for dtype in dtypes:
        model = load(path, dtype)
        found = {False: logits(model, given)}
        model, report = apply_adapter(model, adapter)
        optimize_for_inference(model)
        assert report.peft + report.experts == report.total == 2 * len(modules)
        found[True] = logits(model, given)
        assert rel(wanted[True], wanted[False]) > 0.1, "the adapter must change something"
        if dtype == torch.float32:
            assert max(per_token(found[on], wanted[on]) for on in found) < 2e-5
            continue
        noise = {on: logits(merged_float32(path, adapter if on else None, dtype=dtype), given) for on in found}
        errors, bounds = (
            [*(per_token(these[on], wanted[on]) for on in found), per_token(these[True] - these[False], wanted[True] - wanted[False])]
            for these in (found, noise)
        )  # fmt: skip
        print(name, "ours/stock:", [f"{e:.4f}/{b:.4f}" for e, b in zip(errors, bounds, strict=True)])
        for error, bound in zip(errors, bounds, strict=True):
            assert error < 2 * bound
        assert rel(logits(model, given | {"pixel_values": given["pixel_values"].flip(0)}), found[True]) > 0.05


@pytest.mark.parametrize(
    "change",
    [in_text_class, lambda n: n.replace("base_model.model.model.", "model."), lambda n: n.replace(".model.language_model.", ".language_model.")],
    ids=["text-only class", "no PEFT prefix", "no model."],
)  # fmt: skip
def test_an_adapter_by_other_names(models, tmp_path, change):
    """Patterns of its configuration are for its own names too."""
    path, special = models("qwen3_vl_moe"), "base_model.model.model.language_model.layers.1.self_attn.q_proj"
    adapter = make_adapter(tmp_path / "a", path, rank=3, alpha=6)
    cut = {f"{special}.lora_A.weight": (slice(2),), f"{special}.lora_B.weight": (slice(None), slice(2))}
    edit_adapter(
        adapter, lambda tensors: tensors | {name: tensors[name][part].contiguous() for name, part in cut.items()}
    )

    def scaling(module: str, rank: int) -> float:
        return 40 / 2 if module in special else 6 / rank

    given, wanted = inputs(path, "qwen3_vl_moe"), merged_float32(path, adapter, scaling=scaling)
    edit_adapter(adapter, naming(change))
    own_name = change(f"{special}.lora_A.weight").removeprefix("base_model.model.").removesuffix(".lora_A.weight")
    patterns = {"rank_pattern": {own_name: 2}, "alpha_pattern": {own_name: 40}}
    write_config(adapter, path, r=3, lora_alpha=6, target_modules="all-linear", **patterns)
    model, report = apply_adapter(load(path, torch.float32), adapter)
    assert report.peft + report.experts == report.total
    assert rel(logits(model, given), logits(wanted, given)) < 2e-5
    merge_adapter(path, adapter, tmp_path / "merged")
    merged = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged")
    assert rel(logits(merged, given), logits(wanted, given)) < 2e-5


def test_an_image_text_adapter_on_the_text_only_class(models, tmp_path):
    """Qwen3.5's text-only class reads the same checkpoint; tensors of the vision tower have no place there."""
    path = models("qwen3_5_moe")
    whole = make_adapter(tmp_path / "whole", path, rank=3)
    text = edit_adapter(
        make_adapter(tmp_path / "text", path, rank=3), lambda t: {n: v for n, v in t.items() if ".visual." not in n}
    )
    ids = {"input_ids": torch.arange(2, 60)[None]}

    def text_only(**keys):
        config = open_checkpoint(path).model.config.get_text_config()
        return AutoModelForCausalLM.from_pretrained(path, config=config, dtype=torch.float32, **keys)

    ours = text_only(quantization_config=KTExpertsConfig(backend="torch"))
    assert "ForCausalLM" in type(ours).__name__
    with pytest.raises(KTAdapterError, match=r"visual.* belong to no module|belong to no module of .*visual"):
        apply_adapter(ours, whole)
    ours, report = apply_adapter(ours, text)
    assert report.peft + report.experts == report.total
    wanted = logits(merged_float32(path, text), ids)
    assert per_token(logits(ours, ids), wanted) < 1e-4 < 0.1 < rel(wanted, logits(merged_float32(path, None), ids))


def test_lora_on_the_convolution_that_cuts_patches(models, tmp_path):
    """PEFT's own affair; and it can be taken away and put back."""
    from peft import LoraConfig, get_peft_model

    path = models("qwen3_vl_moe")
    given = inputs(path, "qwen3_vl_moe")
    stock = AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float32)
    base = logits(stock, given)
    made = get_peft_model(stock, LoraConfig(r=3, lora_alpha=6, target_modules=["model.visual.patch_embed.proj"]))
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in (p for n, p in made.named_parameters() if "lora_" in n):
            parameter.normal_(0, 0.1)
    made.save_pretrained(tmp_path / "a")
    model = load(path, torch.float32)
    for adapter, wanted in (
        (tmp_path / "a", logits(made.eval(), given)),
        (None, base),
        (tmp_path / "a", logits(made, given)),
    ):
        switch_adapter(model, adapter)
        assert not [module for module in model.modules() if isinstance(module, torch.nn.Conv3d)]
        assert rel(logits(model, given), wanted) < 2e-5
    assert rel(wanted, base) > 0.01
    merge_adapter(path, tmp_path / "a", tmp_path / "merged")
    merged = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged")
    assert rel(logits(merged, given), wanted) < 2e-5


@pytest.mark.parametrize("name", ["qwen3_vl_moe", "glm4v_moe"])
def test_dora_and_saved_modules(models, tmp_path, name):
    """DoRA on the vision tower and a projector that was trained as a whole, against PEFT's own model."""
    from peft import LoraConfig, get_peft_model

    path = models(name)
    given = inputs(path, name)
    stock = AutoModelForImageTextToText.from_pretrained(path, dtype=torch.float32)
    base = logits(stock, given)
    tower = [
        n
        for n, m in stock.named_modules()
        if ".visual.blocks." in n and ".attn." in n and isinstance(m, torch.nn.Linear)
    ]
    config = LoraConfig(r=3, lora_alpha=5, target_modules=tower, use_dora=True, modules_to_save=["merger"])
    made = get_peft_model(stock, config)
    torch.manual_seed(0)
    with torch.no_grad():
        for tensor in (p for n, p in made.named_parameters() if "lora_" in n or "modules_to_save" in n):
            tensor.add_(torch.randn_like(tensor) * 0.1)
    made.save_pretrained(tmp_path / "a")
    wanted = logits(made.eval(), given)
    model, report = apply_adapter(load(path, torch.float32), tmp_path / "a")
    assert report.peft == report.total == len(load_file(tmp_path / "a" / "adapter_model.safetensors"))
    assert per_token(logits(model, given), wanted) < 2e-5 < 0.1 < rel(wanted, base)
