"""Adapters that other tools trained or wrote, in every layout: each against arithmetic that is not ours."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tiny import make_adapter, make_model, moe_layers, per_token, rel, write_config
from transformers import AutoModelForCausalLM

from llamafactory_kt import KTAdapterError, KTExpertsConfig, KTModelError, KTPathError, apply_adapter
from llamafactory_kt.adapters import ExpertsShape, open_adapter

DATA = Path(__file__).parent / "data"
BASE, BUNDLE, TARGETS = (
    DATA / name for name in ("qwen3_moe-tiny", "qwen3_moe-tiny-kt-bundle", "qwen3_moe-tiny-target-parameters")
)
IDS = torch.arange(30, 70)[None]


def stock(path=BASE):
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)


def ours(adapter, path=BASE):
    config = KTExpertsConfig(backend="torch", adapter=str(adapter))
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, quantization_config=config)
    return apply_adapter(model, adapter)


@torch.inference_mode()
def logits(model):
    return model(input_ids=IDS).logits


@torch.no_grad()
def bundle_reference(model, adapter: Path):
    """The official stack's semantics by a plain sum: alpha / r for experts, attention and router."""
    config = json.loads((adapter / "adapter_config.json").read_text())
    factor = config["lora_alpha"] / config["r"]
    weights = dict(model.named_parameters())
    tensors = load_file(adapter / "adapter_model.safetensors")
    for name, a in tensors.items():
        if ".lora_A." in name:
            module = name.removeprefix("base_model.model.").split(".lora_A")[0]
            weights[f"{module}.weight"] += factor * tensors[name.replace("lora_A", "lora_B")].float() @ a.float()
    fused = load_file(adapter / "fused_expert_lora.safetensors")
    for layer in range(model.config.num_hidden_layers):
        lora = {p: fused[f"layers.{layer}.experts.{p}_lora_b"].float() @ fused[f"layers.{layer}.experts.{p}_lora_a"].float() for p in ("gate", "up", "down")}  # fmt: skip
        weights[f"model.layers.{layer}.mlp.experts.gate_up_proj"] += factor * torch.cat([lora["gate"], lora["up"]], 1)
        weights[f"model.layers.{layer}.mlp.experts.down_proj"] += factor * lora["down"]
    return model


def test_bundle_of_the_official_stack(kt_log):
    """Trained by the official forks; its manifest names a base path of another machine, and its router has LoRA."""
    model, report = ours(BUNDLE)
    wanted = logits(bundle_reference(stock(), BUNDLE))
    assert rel(wanted, logits(stock())) > 0.01
    assert rel(logits(model), wanted) < 2e-5
    files = ("adapter_model.safetensors", "fused_expert_lora.safetensors")
    assert report.total == report.experts + report.peft == sum(len(load_file(BUNDLE / file)) for file in files)
    assert report.format == "KT bundle" and "Added the LoRA of 3 routers" in kt_log.text


def copied(tmp_path, source=BUNDLE) -> Path:
    return Path(shutil.copytree(source, tmp_path / "adapter"))


def test_bundle_without_manifest_and_with_a_broken_one(tmp_path):
    adapter = copied(tmp_path)
    manifest = json.loads((adapter / "kt_adapter_manifest.json").read_text())
    wanted = logits(ours(adapter)[0])

    def with_manifest(change):
        broken = json.loads(json.dumps(manifest))
        change(broken)
        (adapter / "kt_adapter_manifest.json").write_text(json.dumps(broken))
        with pytest.raises(KTAdapterError) as error:
            open_adapter(adapter)
        return str(error.value)

    fused = manifest["artifacts"]["fused_expert_lora.safetensors"]
    assert "size or SHA-256 differ" in with_manifest(
        lambda m: m["artifacts"]["fused_expert_lora.safetensors"].update(sha256="0" * 64)
    )
    assert "size or SHA-256 differ" in with_manifest(lambda m: m["artifacts"]["adapter_config.json"].update(size=1))
    assert "not a file beside it" in with_manifest(lambda m: m["artifacts"].update({"../../etc/passwd": fused}))
    assert "found 1 and 'writing'" in with_manifest(lambda m: m.update(status="writing"))
    assert "alpha is 99" in with_manifest(lambda m: m.update(lora={"rank": 8, "alpha": 99}))
    assert "is not a KT adapter manifest" in with_manifest(lambda m: m.pop("artifacts"))
    (adapter / "kt_adapter_manifest.json").unlink()
    assert torch.equal(logits(ours(adapter)[0]), wanted)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: {k: v for k, v in t.items() if k != "layers.1.experts.up_lora_b"}, "layer 1 has no up_lora_b"),
        (lambda t: {**t, "layers.1.experts.up_lora_b": t["layers.1.experts.up_lora_b"][:, :, :4].contiguous()}, "layer 1, up: a has shape (8, 8, 128) and b (8, 64, 4)"),
        (lambda t: {**t, "layers.1.experts.other": torch.ones(1)}, "the tensor layers.1.experts.other is not one of this format's"),
        (lambda t: {k.replace("layers.2", "layers.7"): v for k, v in t.items()}, "layer 7 has expert LoRA, but the model's layers"),
        (lambda t: {k: v[:6].contiguous() for k, v in t.items()}, "layer 0, gate_proj: LoRA for 6 experts of 64 x 128, the model's are 8"),
        (lambda t: {**t, "layers.0.experts.up_lora_a": t["layers.0.experts.up_lora_a"] * float("nan")}, "hold NaN or Inf"),
    ],
)  # fmt: skip
def test_broken_bundles(tmp_path, change, message):
    adapter = copied(tmp_path)
    (adapter / "kt_adapter_manifest.json").unlink()
    file = adapter / "fused_expert_lora.safetensors"
    save_file(change(load_file(file)), file)
    with pytest.raises(KTAdapterError) as error:
        ours(adapter)
    assert message in str(error.value)


def test_target_parameters_of_peft():
    """Trained by PEFT 0.18.1; PEFT's own forward is the reference."""
    model, report = ours(TARGETS)
    reference = PeftModel.from_pretrained(stock(), TARGETS)
    assert rel(logits(reference), logits(stock())) > 0.01
    assert rel(logits(model), logits(reference)) < 2e-5
    assert rel(logits(model), logits(reference.merge_and_unload())) < 2e-5
    assert report.total == report.experts + report.peft and report.experts == 3 * 4


def peft_target_parameters(tmp_path, base, targets, **config):
    torch.manual_seed(3)
    peft_config = LoraConfig(
        r=3, lora_alpha=7, target_modules=["q_proj"], target_parameters=targets, task_type="CAUSAL_LM", **config
    )
    made = get_peft_model(stock(base), peft_config)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "lora_" in name:
                parameter.normal_(0, 0.1)
    made.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter", made.eval()


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


def moe_lora_of(bundle: Path, file: Path) -> Path:
    """``moe_lora.pt`` with the bundle's experts, written as the SGLang converter does."""
    fused = load_file(bundle / "fused_expert_lora.safetensors")
    out = {
        "metadata": {
            "lora_rank": 8,
            "lora_alpha": 16.0,
            "num_experts": 8,
            "num_layers": 3,
            "hidden_size": 128,
            "intermediate_size": 64,
        }
    }
    for name, tensor in fused.items():
        _, layer, _, part = name.split(".")
        out.setdefault(f"layer_{layer}", {})[part] = tensor
    torch.save(out, file)
    return file


def test_moe_lora_beside_an_adapter_and_alone(tmp_path):
    wanted = logits(ours(BUNDLE)[0])
    adapter = copied(tmp_path)
    moe_lora_of(BUNDLE, adapter / "moe_lora.pt")
    for name in ("kt_adapter_manifest.json", "fused_expert_lora.safetensors"):
        (adapter / name).unlink()
    assert torch.equal(logits(ours(adapter)[0]), wanted)
    (adapter / "moe_lora.pt").rename(tmp_path / "elsewhere.pt")
    opened = open_adapter(adapter, tmp_path / "elsewhere.pt")
    assert opened.layers == [0, 1, 2] and opened.scaling(0) == 2.0 and len(opened.other_names) > 0
    alone = tmp_path / "alone"
    alone.mkdir()
    (tmp_path / "elsewhere.pt").rename(alone / "moe_lora.pt")
    model, report = ours(alone)
    assert report.total == report.experts == 18 and not hasattr(model, "peft_config")
    with pytest.raises(KTPathError, match=r"missing\.pt does not exist"):
        open_adapter(adapter, tmp_path / "missing.pt")


class Hostile:
    def __reduce__(self):
        import os

        return os.system, ("touch hostile-code-was-run",)


@pytest.mark.parametrize("content", [{"metadata": {}, "layer_0": Hostile()}, {"layer_0": {}}, {"metadata": {}, "layer_0": 3}, {"metadata": {"lora_rank": "8"}, "layer_0": {}}])  # fmt: skip
def test_moe_lora_that_is_something_else(tmp_path, monkeypatch, content):
    monkeypatch.chdir(tmp_path)
    torch.save(content, tmp_path / "moe_lora.pt")
    with pytest.raises(KTAdapterError, match=r"moe_lora\.pt"):
        open_adapter(tmp_path)
    assert not (tmp_path / "hostile-code-was-run").exists()


def test_experts_given_twice_by_key(tmp_path):
    with pytest.raises(KTAdapterError, match="was given twice"):
        open_adapter(BUNDLE, moe_lora_of(BUNDLE, tmp_path / "experts.pt"))


def test_an_adapter_that_touches_only_routers_is_applied_once(tmp_path):
    adapter = copied(tmp_path)
    (adapter / "kt_adapter_manifest.json").unlink()
    file = adapter / "adapter_model.safetensors"
    save_file({n: t for n, t in load_file(file).items() if ".mlp.gate." in n}, file)
    model, report = ours(adapter)
    assert report.total == report.experts + report.peft and not hasattr(model, "peft_config")
    with pytest.raises(KTModelError, match="already carries an adapter"):
        apply_adapter(model, adapter)


def test_experts_twice(tmp_path, kt_log):
    base = make_model(tmp_path / "m", "qwen3_moe")
    adapter = make_adapter(tmp_path / "adapter", base)
    moe_lora_of(BUNDLE, adapter / "moe_lora.pt")
    assert open_adapter(adapter).format == "per-expert LoRA tensors" and "moe_lora.pt is not used" in kt_log.text
    assert open_adapter(BUNDLE).layers == [0, 1, 2]
    shutil.copy(BUNDLE / "fused_expert_lora.safetensors", adapter)
    with pytest.raises(KTAdapterError, match="holds routed-expert LoRA twice"):
        open_adapter(adapter)


def test_sglang_directory(tmp_path):
    """Format F: expert keys only, without PEFT's prefix; read as the per-expert layout it is."""
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


def test_every_layout_through_llamafactory(tmp_path):
    """The official stack's bundle, PEFT's target_parameters, and moe_lora.pt through a key of its own."""
    from llamafactory.chat import ChatModel

    def chat(**keys):
        arguments = {
            "model_name_or_path": str(BASE),
            "template": "qwen",
            "use_kt": True,
            "infer_dtype": "bfloat16",
            **keys,
        }
        return logits(ChatModel(arguments).engine.model)

    plain = tmp_path / "plain"
    shutil.copytree(BUNDLE, plain)
    for name in ("kt_adapter_manifest.json", "fused_expert_lora.safetensors"):
        (plain / name).unlink()
    base, bundle = chat(), chat(adapter_name_or_path=str(BUNDLE))
    wanted = logits(bundle_reference(stock(), BUNDLE))
    bfloat16 = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.bfloat16)
    assert per_token(bundle, wanted) < 2 * per_token(logits(bfloat16), logits(stock()))
    moe_lora = moe_lora_of(BUNDLE, tmp_path / "experts.pt")
    assert torch.equal(chat(adapter_name_or_path=str(plain), kt_moe_lora_path=str(moe_lora)), bundle)
    trained = logits(PeftModel.from_pretrained(stock(), TARGETS))
    noise = per_token(logits(PeftModel.from_pretrained(bfloat16, TARGETS)), trained)
    assert per_token(chat(adapter_name_or_path=str(TARGETS)), trained) < 2 * noise
    assert not torch.equal(chat(kt_moe_lora_path=str(moe_lora)), base)
    with pytest.raises(KTPathError, match=r"kt_moe_lora_path: nowhere\.pt does not exist"):
        chat(kt_moe_lora_path="nowhere.pt")
