"""FP8 checkpoints, with attention and experts quantized in blocks, compared with stock transformers on weights that a
plain loop dequantized."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from helpers.adapters import make_adapter
from helpers.fp8 import make_fp8
from helpers.marks import needs_kernel, needs_native, needs_onednn
from helpers.models import make_model
from helpers.references import merged_float32, per_token, rel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from llamafactory_kt import KTExpertsConfig, KTModelError, apply_adapter
from llamafactory_kt.tools.merge import merge_adapter
from llamafactory_kt.tools.quantize import quantize_model

ENGINES = [
    "torch",
    pytest.param("native", marks=needs_native),
    pytest.param("AMXBF16", marks=needs_kernel),
    pytest.param("AMXINT4", marks=needs_kernel),
    pytest.param("oneDNN", marks=needs_onednn),
]
# deepseek_v3 has the official blocks, of which its sizes are no multiples; mixtral has blocks that are not square.
MODELS = {
    "deepseek_v3": ([128, 128], {"hidden_size": 192, "moe_intermediate_size": 160, "kv_lora_rank": 136}),
    "mixtral": ([32, 48], {}),
}


@pytest.fixture(scope="module", params=MODELS)
def files(request, tmp_path_factory):
    root = tmp_path_factory.mktemp(request.param)
    block, sizes = MODELS[request.param]
    source = make_model(root / "source", request.param, dtype=torch.float32, **sizes)
    fp8, plain = make_fp8(root, source, block)
    naming = "mixtral" if request.param == "mixtral" else "B"
    return fp8, plain, make_adapter(root / "adapter", plain, rank=5, naming=naming)


def load(path, **keys):
    dtype = keys.pop("dtype", torch.bfloat16)
    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype, quantization_config=KTExpertsConfig(**keys))


@torch.inference_mode()
def answer(model):
    return model(input_ids=torch.arange(2, 40)[None]).logits.float()


def base_and_whole(path, adapter, backend):
    model = load(path, backend=backend, adapter=str(adapter), dtype=torch.float32)
    base = answer(model)
    return base, answer(apply_adapter(model, adapter)[0])


@pytest.mark.parametrize("backend", ENGINES)
def test_logits_against_stock_in_float32(files, backend):
    """The base, the whole, and the adapter's effect. In float32 only the experts are rounded, so the bounds are tight,
    except for 4 bits over three layers; those are compared with the same engine on the dequantized weights."""
    fp8, plain, adapter = files
    base, whole = base_and_whole(fp8, adapter, backend)
    wanted = answer(merged_float32(plain, None)), answer(merged_float32(plain, adapter))
    bound = {"torch": 0.005, "AMXINT4": 0.4}.get(backend, 0.02)
    assert per_token(base, wanted[0]) < bound
    assert per_token(whole, wanted[1]) < bound
    effects = (whole - base).flatten(), (wanted[1] - wanted[0]).flatten()
    assert torch.cosine_similarity(*effects, dim=0) > (0.9 if backend == "AMXINT4" else 0.99)
    assert rel(wanted[1], wanted[0]) > 0.3
    if backend == "AMXINT4":
        same = base_and_whole(plain, adapter, backend)
        assert rel(base, same[0]) < 1e-3 and rel(whole, same[1]) < 1e-3


def test_everything_but_the_experts_is_the_dequantized_weight_rounded_once(files):
    fp8, plain, _ = files
    weights = dict(load(fp8, backend="torch").named_parameters())
    wanted = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.float32).named_parameters()
    dtypes = {
        n: p.dtype for n, p in AutoModelForCausalLM.from_pretrained(plain, dtype=torch.bfloat16).named_parameters()
    }
    compared = 0
    for name, value in wanted:
        if ".experts." not in name:
            assert weights[name].dtype == dtypes[name] and torch.equal(weights[name], value.to(dtypes[name])), name
            compared += 1
    assert compared == len(weights)


@pytest.mark.parametrize("files", ["deepseek_v3"], indirect=True)
@pytest.mark.parametrize("backend", ["torch", pytest.param("native", marks=needs_native)])
def test_chat_verify_and_doctor(files, backend):
    """A chat in bfloat16 with the whole adapter, and what two commands say about such a checkpoint."""
    chat = pytest.importorskip("llamafactory.chat")
    from typer.testing import CliRunner

    from llamafactory_kt.cli import app

    fp8, plain, adapter = files
    keys = {
        "model_name_or_path": str(fp8), "adapter_name_or_path": str(adapter), "template": "deepseek", "use_kt": True,
        "kt_backend": backend,
    }  # fmt: skip
    model = chat.ChatModel(keys).engine.model
    stock = AutoModelForCausalLM.from_pretrained(plain, dtype=torch.bfloat16)
    dtypes = {p.dtype for n, p in model.named_parameters() if "lora" not in n}
    assert dtypes == {p.dtype for p in stock.parameters()}  # newer transformers keep the router in float32
    assert per_token(answer(model), answer(merged_float32(plain, adapter))) < 0.1
    config = fp8.parent / "chat.yaml"
    config.write_text(json.dumps(keys))
    result = CliRunner().invoke(app, ["verify", str(config)])
    assert result.exit_code == 0 and "layers are right" in result.output
    result = CliRunner().invoke(app, ["doctor", str(config), "--json"])
    found = {finding["subject"]: finding for finding in json.loads(result.stdout)["findings"]}
    assert "experts in F8_E4M3" in found["checkpoint"]["text"]
    assert found["CPU memory"]["status"] == "ok" and not found["CPU memory"]["text"].startswith("about 0")


@needs_kernel
def test_quantized_from_fp8(files, tmp_path):
    """The packed files hold the dequantized weights and fit this checkpoint only."""
    fp8, plain, _ = files
    quantize_model(fp8, tmp_path / "int8", "amxint8")
    model = load(fp8, backend="AMXINT8", weight_path=str(tmp_path / "int8"))
    assert per_token(answer(model), answer(merged_float32(plain, None))) < 0.1
    with pytest.raises(KTModelError, match="made from other weights"):
        load(plain, backend="AMXINT8", weight_path=str(tmp_path / "int8"))


def edited(directory, source, change=None, **quantization):
    """A copy with other tensors or another quantization_config."""
    shutil.copytree(source, directory)
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"] |= quantization
    (directory / "config.json").write_text(json.dumps(config))
    if change is not None:
        tensors = load_file(directory / "model.safetensors")
        change(tensors)
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def test_what_is_wrong_is_said_before_weights_are_read(files, tmp_path):
    fp8, _, adapter = files
    with safe_open(fp8 / "model.safetensors", framework="pt") as handle:
        expert = next(n for n in handle.keys() if ".experts.3." in n and n.endswith("scale_inv"))  # noqa: SIM118
        attention = next(n for n in handle.keys() if "o_proj.weight_scale_inv" in n)  # noqa: SIM118

    def drop(tensors):
        del tensors[expert], tensors[attention]

    def cut(tensors):
        tensors[attention] = tensors[attention][:1, :1].contiguous()

    for number, (change, keys, message) in enumerate([
        (drop, {}, r"2 tensors do not fit the quantization_config in config.json \(FP8\): .* is missing"),
        (cut, {}, r"o_proj.weight_scale_inv is F32 \(1, 1\), wanted F32"),
        (None, {"weight_block_size": None}, r"weight_scale_inv is F32 \(.*\), wanted F32 or BF16 or F16 \(\) or"),
        (None, {"fmt": "e5m2"}, "fmt: e5m2"),
        (None, {"quant_method": "hqq"}, "quantized checkpoint .quant_method: hqq"),
    ]):  # fmt: skip
        with pytest.raises(KTModelError, match=message):
            load(edited(tmp_path / str(number), fp8, change, **keys), backend="torch")
    with pytest.raises(KTModelError, match=r"is a quantized checkpoint \(FP8\)"):
        merge_adapter(fp8, adapter, tmp_path / "merged")
    without = edited(tmp_path / "without", fp8)
    config = json.loads((without / "config.json").read_text())
    del config["quantization_config"]
    (without / "config.json").write_text(json.dumps(config))
    with pytest.raises(KTModelError, match="is F8_E4M3; experts must be stored"):
        load(without, backend="torch")
