"""``kt_dense``: a model whose linear layers are integers, against float sums on the weights that the codes stand for."""

from __future__ import annotations

import pytest
import torch
from helpers.adapters import make_adapter
from helpers.loading import ONE_ROW, answer, load
from helpers.marks import needs_native
from helpers.models import make_model, stock_class
from helpers.references import merged_float32, per_token, rel
from torch import nn

from llamafactory_kt import KTConfigError, KTModelError, apply_adapter, optimize_for_inference, switch_adapter
from llamafactory_kt.decoding import quantized_linear
from llamafactory_kt.decoding.native_linear import NativeLinear
from llamafactory_kt.load_report import load_rows
from llamafactory_kt.model.experts_module import KTExperts
from llamafactory_kt.native.quantized_tensor import QuantizedTensor

pytestmark = [needs_native, pytest.mark.usefixtures("worker_threads")]


@pytest.fixture(autouse=True)
def none_is_small(monkeypatch):
    """The layers of test models are."""
    monkeypatch.setattr(quantized_linear, "SMALL", 256)


def quantized(model: nn.Module) -> dict[str, QuantizedTensor]:
    weights = {name: module.weight for name, module in model.named_modules() if isinstance(module, NativeLinear)}
    return {
        name.removeprefix("base_model.model.").replace(".base_layer", ""): weight
        for name, weight in weights.items()
        if isinstance(weight, QuantizedTensor)
    }


def decoded(path, weights, to):
    """The checkpoint with these weights instead, in float32."""
    stock = stock_class(path).from_pretrained(path, dtype=torch.float32)
    for name, weight in weights.items():
        stock.get_submodule(name).weight.data = weight.packed.dequantize()
    stock.save_pretrained(to)
    return to


@pytest.mark.parametrize("architecture", ["qwen3_moe", "deepseek_v2", "mixtral"])
@pytest.mark.parametrize("dense", ["int8", "int4"])
def test_a_model_with_lora_against_float32(architecture, dense, tmp_path):
    path = make_model(tmp_path / "model", architecture)
    adapter = make_adapter(tmp_path / "adapter", path, rank=4)
    model, _ = apply_adapter(load(path, backend="native", adapter=str(adapter), dense=dense), str(adapter))
    optimize_for_inference(model)
    weights = quantized(model)
    assert ("Linear layers", f"{len(weights)} as {dense}, with a scale for each 32 weights") in load_rows(model)
    assert {"o_proj", "lm_head"} <= {name.rpartition(".")[2] for name in weights}
    assert not any(name.endswith((".mlp.gate", "block_sparse_moe.gate")) for name in weights), "routers"
    plain = decoded(path, weights, tmp_path / "decoded")
    wanted = answer(merged_float32(plain, adapter)), answer(merged_float32(plain, None))
    bf16 = answer(merged_float32(plain, adapter, dtype=torch.bfloat16))
    assert per_token(answer(model), wanted[0]) < 1.5 * per_token(bf16, wanted[0])
    assert rel(wanted[0], wanted[1]) > 0.3
    step_by_step = model.generate(
        ONE_ROW, max_new_tokens=4, do_sample=False, output_logits=True, return_dict_in_generate=True
    )
    whole = model(step_by_step.sequences[:, :-1]).logits[:, -4:]
    assert per_token(torch.stack(step_by_step.logits, 1), whole.float()) < 0.06


def test_another_adapter_and_what_python_reads(tmp_path):
    path = make_model(tmp_path / "model", "qwen3_moe")
    first, second = (make_adapter(tmp_path / name, path, rank=rank, seed=rank) for name, rank in (("a", 4), ("b", 7)))
    model, _ = apply_adapter(load(path, backend="native", adapter=str(first), dense="int8"), str(first))
    optimize_for_inference(model)
    before = {name: id(weight.packed) for name, weight in quantized(model).items()}
    switch_adapter(model, str(second))
    weights = quantized(model)
    assert {name: id(weight.packed) for name, weight in weights.items()} == before, "quantized once"
    wanted = answer(merged_float32(decoded(path, weights, tmp_path / "decoded"), second))
    assert per_token(answer(model), wanted) < 0.06
    weight = weights["lm_head"]
    assert weight.dtype == torch.bfloat16 and weight.nbytes < 0.55 * weight.numel() * 2
    assert torch.equal(weight.float(), weight.packed.dequantize(torch.bfloat16).float())
    assert isinstance(weight.detach(), QuantizedTensor)
    x = torch.randn(3, weight.shape[1], dtype=torch.bfloat16)
    torch.testing.assert_close(nn.functional.linear(x, weight), x @ weight.packed.dequantize(torch.bfloat16).T)
    with pytest.raises(RuntimeError, match=r"cannot be changed in place\. Load with kt_dense: same"):
        weight.data.mul_(2)


@pytest.mark.parametrize("container", ["model.layers", "model.language_model.layers", "transformer.blocks", "h"])
def test_the_language_models_layers_are_found_whatever_they_are_called(container):
    """Not those of a vision tower beside it."""
    experts = nn.Module.__new__(KTExperts)
    nn.Module.__init__(experts)
    experts.num_experts = 5
    model = nn.Module()
    attention, router, patches = nn.Linear(32, 32), nn.Linear(96, 5), nn.Linear(64, 64)
    for name, module in (
        (f"{container}.0.attn", attention),
        (f"{container}.0.gate", router),
        (f"{container}.0.experts", experts),
    ):
        add(model, name, module)
    add(model, "model.visual.patches" if container.startswith("model.lang") else "visual.patches", patches)
    found = quantized_linear.quantizable(model, quantized_linear.experts_of(model))
    assert attention in found and router not in found and (patches in found) == (container == "h")


def add(model: nn.Module, name: str, module: nn.Module) -> None:
    for part in name.split(".")[:-1]:
        if part not in model._modules:
            model.add_module(part, nn.Module())
        model = model._modules[part]
    model.add_module(name.rpartition(".")[2], module)


def test_tied_embeddings_stay_as_they_are(tmp_path):
    path = make_model(tmp_path / "model", "qwen3_moe", tie_word_embeddings=True)
    model = load(path, backend="native", dense="int4")
    plain = model.get_input_embeddings().weight.clone()
    optimize_for_inference(model)
    assert torch.equal(model.get_input_embeddings().weight, plain) and "lm_head" in quantized(model)


def test_what_is_refused(tmp_path):
    path = make_model(tmp_path / "model", "qwen3_moe")
    with pytest.raises(
        KTConfigError, match="dense: unknown value 'int5', expected one of same, int8, int4; did you mean int"
    ):
        load(path, dense="int5")
    model = load(path, backend="native", dense="int4")
    model.lm_head.weight.data[5, 5] = torch.inf
    with pytest.raises(KTModelError, match=r"A linear layer with 1024 x \d+ weights has values that are not finite"):
        optimize_for_inference(model)
