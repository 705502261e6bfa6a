"""kt_merge_adapter, and AVX2BF16, which always merges: compared with plain float32 sums and with PEFT's own merge."""

from __future__ import annotations

import json

import peft
import pytest
import torch
from helpers.adapters import edit_adapter, make_adapter, write_config
from helpers.loading import answer, load
from helpers.marks import needs_base_kernel, needs_kernel, needs_native, needs_onednn
from helpers.models import make_model
from helpers.references import merged_float32, per_token, rel
from packaging.version import Version
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from llamafactory_kt import (
    KTConfigError,
    KTModelError,
    apply_adapter,
    load_moe_lora_from_adapter,
    switch_adapter,
)
from llamafactory_kt.model.state import kt_state

pytestmark = pytest.mark.usefixtures("worker_threads")

ENGINES = [
    "torch",
    pytest.param("AMXBF16", marks=needs_kernel),
    pytest.param("AMXINT4", marks=needs_kernel),
    pytest.param("AVX2BF16", marks=needs_base_kernel),
    pytest.param("native", marks=needs_native),
    pytest.param("oneDNN", marks=needs_onednn),
]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A model; an adapter on everything; one of another rank, without experts in one layer; and the model with the
    first adapter merged by a plain sum."""
    root = tmp_path_factory.mktemp("files")
    model = make_model(root / "model", "deepseek_v2")
    first = make_adapter(root / "first", model, rank=4)
    second = make_adapter(root / "second", model, rank=12, alpha=18, seed=7, skip_layers=(1,))
    merged = root / "merged"
    merged_float32(model, first, dtype=torch.bfloat16).save_pretrained(merged)
    return model, first, second, merged


def merged_model(path, adapters, backend):
    model = load(path, backend=backend, adapter=adapters, merge_adapter=backend != "AVX2BF16")
    return apply_adapter(model, adapters)


@pytest.mark.parametrize("backend", ENGINES)
def test_merged_while_loading_is_merged_before(files, backend):
    """The whole is compared with the same engine on a checkpoint that was merged beforehand, the adapter's effect with
    float32."""
    path, adapter, _, merged = files
    model, report = merged_model(path, str(adapter), backend)
    whole, base = answer(model).float(), answer(load(path, backend=backend)).float()
    assert rel(whole, answer(load(merged, backend=backend)).float()) < 0.01
    wanted = answer(merged_float32(path, None)), answer(merged_float32(path, adapter))
    assert per_token(whole, wanted[1]) < (0.4 if backend == "AMXINT4" else 0.05)
    effects = (whole - base).flatten(), (wanted[1] - wanted[0]).flatten()
    # 4 bits round the base's weights and the merged ones differently, and that is in their difference
    assert torch.cosine_similarity(*effects, dim=0) > (0.95 if backend == "AMXINT4" else 0.99)
    assert rel(wanted[1], wanted[0]) > 0.5
    assert report.merged and report.peft + report.experts == report.total


@pytest.mark.parametrize("backend", ENGINES)
def test_two_adapters_at_once(files, backend):
    path, first, second, _ = files
    model, _ = merged_model(path, [str(first), str(second)], backend)
    assert per_token(answer(model).float(), answer(merged_float32(path, [first, second]))) < (
        0.4 if backend == "AMXINT4" else 0.05
    )


@pytest.mark.skipif(
    Version(peft.__version__) >= Version("0.19"),
    reason="this PEFT moves the LoRA of a model's dense layers to its experts",
)
def test_the_rest_is_merged_by_peft(files, tmp_path):
    """Bit for bit what PEFT makes of a stock model and the adapter without its expert part."""
    path, adapter, _, _ = files
    model, _ = merged_model(path, str(adapter), "torch")
    config = json.loads((adapter / "adapter_config.json").read_text())
    rest = tmp_path / "rest"
    rest.mkdir()
    (rest / "adapter_model.safetensors").write_bytes((adapter / "adapter_model.safetensors").read_bytes())
    edit_adapter(rest, lambda tensors: {n: t for n, t in tensors.items() if ".mlp.experts." not in n})
    modules = {
        n.removeprefix("base_model.model.").split(".lora_")[0] for n in load_file(rest / "adapter_model.safetensors")
    }
    write_config(rest, path, r=config["r"], lora_alpha=config["lora_alpha"], target_modules=sorted(modules))
    stock = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
    plain = {n: p.clone() for n, p in stock.named_parameters()}
    stock = PeftModel.from_pretrained(stock, rest).merge_and_unload()
    wanted, found = dict(stock.named_parameters()), dict(model.named_parameters())
    assert set(found) == {name for name in wanted if ".experts." not in name}
    assert all(torch.equal(found[name], wanted[name]) for name in found)
    assert sum(not torch.equal(found[name], plain[name]) for name in found) == len(modules)


@pytest.mark.parametrize("backend", ["torch", pytest.param("AMXBF16", marks=needs_kernel)])
def test_nothing_of_lora_is_left(files, backend):
    path, adapter, _, _ = files
    model, _ = merged_model(path, str(adapter), backend)
    assert not any("lora" in name for name, _ in model.named_modules()) and not hasattr(model, "peft_config")
    for wrapper in kt_state(model).wrappers:
        assert wrapper.engine.lora_rank == wrapper.engine.lora_nbytes == 0
        if backend != "torch":
            assert never_had_lora(wrapper.engine) and wrapper.engine.kernel.kind.rank == 0


def never_had_lora(engine):
    """kt-kernel shows it nowhere else: it computes LoRA of zeros like any other."""
    return not engine.kernel.wrapper._lora_initialized


@pytest.mark.parametrize("backend", ["torch", pytest.param("AMXBF16", marks=needs_kernel)])
def test_layers_without_expert_lora_pay_nothing(files, backend):
    """Even where nothing is merged, such a layer's kernel is never given LoRA, not even zeros."""
    path, _, second, _ = files
    model, _ = apply_adapter(load(path, backend=backend, adapter=str(second)), second)
    without, with_lora = (wrapper.engine for wrapper in kt_state(model).wrappers)
    assert (without.lora_nbytes, with_lora.lora_rank) == (0, 12) and with_lora.lora_nbytes > 0
    if backend != "torch":
        assert [never_had_lora(engine) for engine in (without, with_lora)] == [True, False]


@pytest.mark.parametrize("backend", ["torch", pytest.param("AVX2BF16", marks=needs_base_kernel)])
def test_what_needs_the_adapter_apart_is_refused(files, backend):
    path, first, second, _ = files
    model = load(path, backend=backend, adapter=str(first), merge_adapter=backend == "torch")
    with pytest.raises(KTModelError, match="first merged into their weights"):
        apply_adapter(model, second)
    model, _ = apply_adapter(model, first)
    before = answer(model)
    reason = "computes no LoRA" if backend == "AVX2BF16" else "kt_merge_adapter: true"
    for call in (apply_adapter, switch_adapter, load_moe_lora_from_adapter):
        for adapter in (first, second):
            with pytest.raises(KTModelError, match=reason):
                call(model, adapter)
    with pytest.raises(KTModelError, match="can no longer be changed"):
        switch_adapter(model, None)
    assert torch.equal(answer(model), before)
    with pytest.raises(KTConfigError, match="merge_adapter: true cannot change the packed weights of weight_path"):
        load(path, backend="AMXINT8", weight_path=str(path), adapter=str(first), merge_adapter=True)


def test_the_key_in_a_chat_and_verify(files, tmp_path):
    from llamafactory.chat import ChatModel
    from typer.testing import CliRunner

    from llamafactory_kt.cli import app
    from llamafactory_kt.tools.experiments.plan import plan_variants

    path, adapter, _, _ = files
    keys = {
        "model_name_or_path": str(path), "adapter_name_or_path": str(adapter), "template": "deepseek", "use_kt": True,
        "kt_backend": "torch", "kt_merge_adapter": True,
    }  # fmt: skip
    model = ChatModel(keys).engine.model
    assert per_token(answer(model).float(), answer(merged_float32(path, adapter))) < 0.05
    (tmp_path / "chat.yaml").write_text(json.dumps(keys))
    result = CliRunner().invoke(app, ["verify", str(tmp_path / "chat.yaml")])
    assert result.exit_code == 0 and "All 2 layers are right" in result.output
    assert "merged into the weights: compared as a whole" in result.output
    with pytest.raises(KTConfigError, match="--ablate takes the adapter apart"):
        plan_variants([tmp_path / "chat.yaml"], ablate=True)
    with pytest.raises(KTConfigError, match="kt_merge_adapter: true cannot change the packed weights"):
        ChatModel({**keys, "kt_backend": "AMXINT8", "kt_weight_path": str(tmp_path)})
    with pytest.raises(KTConfigError, match="kt_merge_adapter must be true or false, found 'yes please'"):
        ChatModel({**keys, "kt_merge_adapter": "yes please"})
