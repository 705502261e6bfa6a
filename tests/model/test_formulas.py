"""Experts that compute something else than gated SiLU: every engine that says it can, with LoRA on their weights, against PEFT's own
merge into stock transformers; and what is refused."""

from __future__ import annotations

import copy
import json
import shutil
from dataclasses import asdict

import pytest
import torch
from helpers.architectures import tiny_model
from helpers.experts import lora_for
from helpers.foreign_adapters import peft_target_parameters
from helpers.loading import load, logits
from helpers.marks import needs_kernel, needs_native, needs_onednn
from helpers.references import per_token
from packaging.version import Version
from transformers import AutoModelForCausalLM

from llamafactory_kt import KTAdapterError, KTKernelError, KTModelError, apply_adapter
from llamafactory_kt.adapters import ExpertsShape, open_adapters
from llamafactory_kt.adapters.keys import PROJECTIONS
from llamafactory_kt.autotune import worker
from llamafactory_kt.checkpoint.discovery import find_experts
from llamafactory_kt.checkpoint.expert_weights import ExpertBiases, ExpertWeights
from llamafactory_kt.checkpoint.formula import ExpertFormula
from llamafactory_kt.engines import base, registry
from llamafactory_kt.engines.plan import Plan
from llamafactory_kt.engines.reference import ReferenceEngine
from llamafactory_kt.ground import internals
from llamafactory_kt.model.state import kt_state
from llamafactory_kt.tools.bench.stock import merge_into
from llamafactory_kt.tools.convert import convert_peft_to_kt_format
from llamafactory_kt.tools.doctor import diagnose, packages
from llamafactory_kt.tools.merge import merge_adapter
from llamafactory_kt.tools.quantize import quantize_model
from llamafactory_kt.tools.verify import record_inputs, verify_layers
from llamafactory_kt.tools.verify.reference import Reference

GATED = ["experts.gate_up_proj", "experts.down_proj"]
BFLOAT16 = [pytest.param("native", marks=needs_native), pytest.param("oneDNN", marks=needs_onednn)]
DEVIATING = {
    "gpt_oss": GATED,
    "gemma4_text": GATED,
    "llama4_text": ["feed_forward.experts.gate_up_proj", "feed_forward.experts.down_proj"],
    "nemotron_h": ["experts.up_proj", "experts.down_proj"],
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Checkpoints in bfloat16, each with an adapter that PEFT made for it and stock transformers' float32 model with it merged."""
    made = {}

    def get(name: str):
        if name not in made:
            path = tmp_path_factory.mktemp(name)
            tiny_model(name).to(torch.bfloat16).save_pretrained(path / "model")
            made[name] = path / "model", *peft_target_parameters(path, path / "model", DEVIATING[name], std=0.3)
        return made[name]

    return get


@pytest.mark.parametrize("name", DEVIATING)
def test_lora_is_exact(models, name):
    path, adapter, reference = models(name)
    found = logits(apply_adapter(load(path, "torch", dtype=torch.float32, adapter=str(adapter)), adapter)[0])
    with reference.disable_adapter():
        base_model = logits(reference)
    assert per_token(base_model, logits(reference)) > 0.1
    assert per_token(found, logits(reference)) < 1e-5


@pytest.mark.parametrize(
    ("targets", "pattern", "rank", "scaling"),
    [
        (["experts.up_proj", "experts.down_proj"], {"up_proj": 5}, 5, 11 / 5),
        (["experts.up_proj", "experts.down_proj"], {"down_proj": 5}, 5, 11 / 3),
        (["experts.up_proj"], {"up_proj": 9}, 9, 11 / 9),
    ],
)
def test_ranks_of_experts_without_a_gate(models, tmp_path, targets, pattern, rank, scaling):
    path, *_ = models("nemotron_h")
    adapter, reference = peft_target_parameters(
        tmp_path, path, targets, std=0.3,
        rank_pattern={rf"experts\.{name}": size for name, size in pattern.items()}, alpha_pattern={r"experts\.up_proj": 11},
    )  # fmt: skip
    model = load(path, "torch", dtype=torch.float32, adapter=str(adapter))
    spec = kt_state(model).wrappers[0].engine.spec
    assert (spec.lora_rank, spec.lora_scaling) == (rank, pytest.approx(scaling))
    assert per_token(logits(apply_adapter(model, adapter)[0]), logits(reference)) < 1e-5


@pytest.mark.parametrize("engine", BFLOAT16)
@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("name", DEVIATING)
def test_engines_in_bfloat16(models, name, merged, engine):
    """Within twice the error of stock transformers in bfloat16."""
    path, adapter, reference = models(name)
    model = load(path, engine, adapter=str(adapter), merge_adapter=merged)
    found = logits(apply_adapter(model, adapter)[0])
    wanted = logits(reference)
    noise = per_token(logits(copy.deepcopy(reference).merge_and_unload().to(torch.bfloat16)), wanted)
    assert per_token(found, wanted) < 2 * noise


FORMULAS = [
    ExpertFormula(),
    ExpertFormula("gelu"),
    ExpertFormula("gelu_tanh", limit=2.0),
    ExpertFormula("silu", limit=2.0),
    ExpertFormula("silu", limit=2.0, limit_activated=True),
    ExpertFormula("silu", alpha=1.702, limit=2.0, up_offset=1.0, has_biases=True),
    ExpertFormula("relu"),
    ExpertFormula("relu2", has_gate=False),
    ExpertFormula("silu", has_gate=False, has_biases=True),
]


@pytest.mark.parametrize("engine", [*BFLOAT16, "torch"])
@pytest.mark.parametrize("formula", FORMULAS, ids=str)
def test_engines_against_float64(engine, formula):
    """One layer, with LoRA; the formula itself is what transformers' forward is compared with."""
    shape = ExpertsShape(5, 64, 40, formula.has_gate)
    generator = torch.Generator().manual_seed(0)

    def random(*size):
        return torch.randn(*size, generator=generator).bfloat16().double()

    sizes = [shape.projection(projection) for projection in PROJECTIONS]
    weights = [random(5, out, width) * 2**-2 for out, width in sizes]
    biases = ExpertBiases(*(random(5, out).float() for out, _ in sizes)) if formula.has_biases else None
    lora = lora_for(shape, 3, 0.5)
    full = [w + lora.delta(p, slice(None)).double() for w, p in zip(weights, PROJECTIONS, strict=True)]
    kind = registry.get_engine(engine)
    spec = base.EngineSpec(0, shape, 2, 3, formula=formula, read_biases=lambda: biases)
    made = kind(
        spec, lambda dtype: (ExpertWeights(*(w.bfloat16() for w in each)) for each in zip(*weights, strict=True))
    )
    made.load()
    made.set_lora(lora)
    x, index, scores = random(7, 64), torch.arange(14).view(7, 2) % 5, torch.rand(7, 2, generator=generator).double()

    def product(place, inner):
        found = torch.einsum("tkoi,tki->tko", full[place][index], inner)
        return found + biases[place][index] if biases is not None else found

    rows = x[:, None].expand(-1, 2, -1)
    outs = product(2, formula.activate(product(0, rows), product(1, rows)))
    wanted = (scores[..., None] * outs).sum(1)
    found = made.forward(x.float(), index, scores)
    assert per_token(found[None].double(), wanted[None]) < (1e-5 if engine == "torch" else 0.02)


def test_auto_takes_an_engine_that_can(models):
    path, *_ = models("gpt_oss")
    assert kt_state(load(path)).plan.backend in ("native", "oneDNN", "torch")


@needs_kernel
@pytest.mark.parametrize("name", ["gpt_oss", "gemma4_text", "nemotron_h"])
def test_kt_kernel_is_refused_before_weights_load(models, name, monkeypatch):
    monkeypatch.setattr(registry.get_engine("AMXBF16"), "load", None)
    path, *_ = models(name)
    with pytest.raises(
        KTKernelError, match=r"AMXBF16 cannot compute the experts of this model: they are down\(.*, and it computes"
    ):
        load(path, "AMXBF16")


class Foreign(ReferenceEngine):
    """An engine of another distribution, which says nothing about formulas."""

    name = "foreign"
    cannot_compute = base.Engine.cannot_compute


def test_other_engines_get_plain_experts_alone(models, monkeypatch):
    monkeypatch.setattr(registry, "engines", lambda: (Foreign, ReferenceEngine))
    monkeypatch.setattr("llamafactory_kt.autotune.plan.engines", lambda: (Foreign, ReferenceEngine))
    monkeypatch.setattr(Foreign, "auto", classmethod(lambda cls, merged: True))
    path, *_ = models("gpt_oss")
    assert kt_state(load(path)).plan.backend == "torch"
    with pytest.raises(KTKernelError, match="foreign cannot compute the experts"):
        load(path, "foreign")
    plain, *_ = models("llama4_text")
    assert kt_state(load(plain)).plan.backend == "foreign"


@pytest.mark.parametrize("name", DEVIATING)
def test_merged_checkpoint_and_stock_with_the_adapter(models, tmp_path, name):
    """What ``merge`` writes, and the bench's stock model, against PEFT's sum."""
    path, adapter, reference = models(name)
    merge_adapter(path, adapter, tmp_path / "merged")
    wanted = copy.deepcopy(reference).merge_and_unload().state_dict()
    with torch.no_grad():
        stock = merge_into(AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32), open_adapters([adapter]))
    before = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).state_dict()
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).state_dict()
    changed = [key for key in wanted if not torch.equal(wanted[key], before[key])]
    assert sum(key.rpartition(".")[0].endswith("experts") for key in changed) >= 4
    for key in wanted:
        torch.testing.assert_close(found[key], wanted[key], rtol=2**-7, atol=2**-10)
        torch.testing.assert_close(stock.state_dict()[key], wanted[key], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", DEVIATING)
def test_verify_computes_the_same(models, name):
    """The reference of ``verify`` agrees with the engine on what the experts got, with LoRA and without."""
    path, adapter, _ = models(name)
    model, _ = apply_adapter(load(path, "torch", adapter=str(adapter)), adapter)
    inputs = record_inputs(model, list(range(2, 40)))
    results = list(verify_layers(model, inputs, Reference(path, open_adapters(adapter))))
    assert len(results) >= 2 and not any(result.problem for result in results)
    assert all(result.prompt.total < 5e-3 < result.prompt.effect for result in results)


@needs_onednn
@pytest.mark.parametrize("name", ["gpt_oss", "nemotron_h"])
def test_plans_are_measured_with_what_the_experts_compute(models, name):
    module = find_experts(AutoModelForCausalLM.from_pretrained(models(name)[0]))[0]
    task = {"experts": 4, "layer": [6, 64, 40, 3], "options": [1, 512], "formula": asdict(module.formula)}
    engine = worker._engine(Plan("oneDNN", 0, 1), json.loads(json.dumps(task)))
    assert (engine.spec.formula, engine.spec.shape.has_gate) == (module.formula, module.shape.has_gate)
    worker._layer(engine, 4)(2, torch.empty(0, 64, 64))


@needs_kernel
def test_doctor_and_quantize_say_so_too(models, tmp_path, monkeypatch):
    path, *_ = models("gpt_oss")
    monkeypatch.setattr(packages, "try_imports", lambda: packages.Imports({}, frozenset()))
    values = {"model_name_or_path": str(path), "template": "deepseek", "use_kt": True, "kt_backend": "AMXBF16"}
    (tmp_path / "c.yaml").write_text(json.dumps(values))
    found = {finding.subject: finding for finding in diagnose(tmp_path / "c.yaml")}
    assert "each down(silu(min(gate x, 7), alpha 1.702)" in found["model"].text
    assert "AMXBF16 cannot compute the experts of this model" in found["experts"].text
    with pytest.raises(KTModelError, match="kt-kernel cannot use packed experts of"):
        quantize_model(path, tmp_path / "packed", "amxint4")
    assert not (tmp_path / "packed").exists()


@pytest.mark.parametrize("name", DEVIATING)
def test_untested_versions_are_checked_with_the_same(models, monkeypatch, kt_log, name):
    monkeypatch.setitem(internals.TESTED, "transformers", "<5")
    path, adapter, _ = models(name)
    load(path, "torch", adapter=str(adapter), merge_adapter=True)
    assert "as they should be" in kt_log.text


def test_lora_whose_orientation_is_not_told_is_refused(tmp_path):
    """As large as gpt-oss: ``down_proj`` is square, and PEFT 0.19 and later lay LoRA either way over transposed weights."""
    path = tmp_path / "model"
    tiny_model("gpt_oss", intermediate_size=64).save_pretrained(path)
    adapter, reference = peft_target_parameters(tmp_path, tmp_path / "model", ["experts.down_proj"], std=0.3)
    config = json.loads((adapter / "adapter_config.json").read_text())
    if Version(config["peft_version"]) < Version("0.19"):
        found = logits(apply_adapter(load(path, "torch", dtype=torch.float32, adapter=str(adapter)), adapter)[0])
        assert per_token(found, logits(reference)) < 1e-5
    (adapter / "adapter_config.json").write_text(json.dumps({**config, "peft_version": "0.19.1"}))
    with pytest.raises(KTAdapterError, match="lay it either way over weights that are stored transposed"):
        load(path, "torch", adapter=str(adapter))


def test_an_adapter_of_interleaved_weights_is_converted_with_its_model(models, tmp_path):
    path, adapter, _ = models("gpt_oss")
    shape = find_experts(AutoModelForCausalLM.from_pretrained(path))[1].shape
    written = convert_peft_to_kt_format(adapter, tmp_path / "moe_lora.pt", model_path=path)
    wanted, found = (
        open_adapters([directory]).read_layer(1, shape).fused_delta("gate_up_proj", shape.fused, slice(None))
        for directory in (adapter, tmp_path)
    )
    assert written["num_experts"] == 6 and wanted.norm() > 1
    torch.testing.assert_close(found, wanted)


def test_an_adapter_of_transposed_weights_is_not_converted_without_its_model(models, tmp_path, kt_log):
    _, adapter, _ = models("gpt_oss")
    config = json.loads((adapter / "adapter_config.json").read_text())
    if Version(config["peft_version"]) < Version("0.19"):
        with pytest.raises(KTAdapterError, match="does not tell the number, sizes and layout of the experts"):
            convert_peft_to_kt_format(adapter, tmp_path / "moe_lora.pt")
    shutil.copytree(adapter, tmp_path / "newer")
    (tmp_path / "newer" / "adapter_config.json").write_text(json.dumps({**config, "peft_version": "0.19.1"}))
    convert_peft_to_kt_format(tmp_path / "newer", tmp_path / "moe_lora.pt")
    assert "Where they take turns, as in gpt-oss, give --model" in kt_log.text
