"""Experts' LoRA as trainers beside PEFT write it, compared with a plain float32 sum in stock transformers."""

from __future__ import annotations

import json

import pytest
import torch
from helpers.adapters import write_config
from helpers.architectures import tiny_model
from helpers.expert_layouts import each_projection, fused_projections, gate_up
from helpers.expert_tensors import SHAPE, save
from helpers.foreign_adapters import ours, stock
from helpers.loading import logits
from helpers.models import make_model
from helpers.references import per_token
from safetensors.torch import save_file

from llamafactory_kt import KTAdapterError
from llamafactory_kt.adapters import open_adapter
from llamafactory_kt.tools.merge import merge_adapter
from llamafactory_kt.tools.verify.reference import _deltas

E, R, ALPHA = 6, 4, 7
EXPERTS = "base_model.model.model.layers.{layer}.mlp.experts"
ALL = dict.fromkeys(("gate", "up", "down"), "")


def random_lora(layers, hidden, intermediate, *, fused=False, shared=()):
    """layer -> projection -> A [E, R, in] and B [E, out, R]. ``fused``: gate and up have one A; ``shared``: the same for all experts."""
    generator = torch.Generator().manual_seed(5)
    found = {}
    for layer in layers:
        found[layer] = {}
        for projection in ("gate", "up", "down"):
            out, width = (hidden, intermediate) if projection == "down" else (intermediate, hidden)
            halves = {
                "a": torch.randn(E, R, width, generator=generator),
                "b": torch.randn(E, out, R, generator=generator),
            }
            for side in halves:
                halves[side] *= 0.15
                if projection + side in shared:
                    halves[side] = halves[side][:1].expand(E, -1, -1)
            if fused and projection == "up":
                halves["a"] = found[layer]["gate"][0]
            found[layer][projection] = halves["a"], halves["b"]
    return found


def write(directory, base, lora, rename, **config):
    """``rename(layer, projections)`` gives the names after ``experts`` and the tensors."""
    directory.mkdir()
    tensors = {}
    for layer, projections in lora.items():
        for name, tensor in rename(projections):
            tensors[f"{EXPERTS.format(layer=layer)}.{name}.weight"] = tensor.contiguous().clone()
    save_file(tensors, directory / "adapter_model.safetensors")
    write_config(directory, base, **{"r": R, "lora_alpha": ALPHA, **config})
    return directory


@torch.no_grad()
def summed(base, lora, *, interleaved=False, factor=ALPHA / R):
    """Stock transformers with ΔW added to the experts' fused weights."""
    model = stock(base)
    for layer, projections in lora.items():
        experts = model.model.layers[layer].mlp.experts
        delta = {name: factor * (b @ a) for name, (a, b) in projections.items()}
        if interleaved:  # gpt-oss: [E, in, out], gate's and up's rows take turns
            experts.gate_up_proj[..., ::2] += delta["gate"].transpose(1, 2)
            experts.gate_up_proj[..., 1::2] += delta["up"].transpose(1, 2)
            experts.down_proj += delta["down"].transpose(1, 2)
        else:
            experts.gate_up_proj += torch.cat([delta["gate"], delta["up"]], 1)
            experts.down_proj += delta["down"]
    return model


def shared_outer_of_vllm(projections):
    for name, (a, b) in projections.items():
        w = {"gate": "w1", "up": "w3", "down": "w2"}[name]
        yield f"{w}.lora_A", a if name == "down" else a[:1]
        yield f"{w}.lora_B", b[:1] if name == "down" else b


def shared_outer_of_megatron_bridge(projections):
    """The shared half under a name without a number, the other half for each expert."""
    for name, (a, b) in projections.items():
        shared, own = ("B", "A") if name == "down" else ("A", "B")
        halves = {"A": a, "B": b}
        yield f"{name}_proj.lora_{shared}", halves[shared][:1]
        for expert in range(E):
            yield f"{expert}.{name}_proj.lora_{own}", halves[own][expert]


def shared_by_all(projections):
    for name, (a, b) in projections.items():
        yield from ((f"{name}_proj.lora_A", a[:1]), (f"{name}_proj.lora_B", b[:1]))


def lists_of_experts(projections):
    """gpt-oss in 4 bits, as Unsloth trains it."""
    a, _ = gate_up(projections)
    b = torch.stack([projections["gate"][1], projections["up"][1]], 2).flatten(1, 2)
    for expert in range(E):
        for name, half in (("gate_up", (a, b)), ("down", projections["down"])):
            for side, tensor in zip("AB", half, strict=True):
                yield f"{name}_projs.{expert}.lora_{side}", tensor[expert]


def three_dimensions_of_vllm(projections):
    for name, (a, b) in (("base_layer.", gate_up(projections)), ("", projections["down"])):
        yield from ((f"{name}lora_A", a), (f"{name}lora_B", b.permute(1, 2, 0)))


def flat(projections):
    """PEFT's order since 0.19, without a version, as SkyRL writes it."""
    for name, (a, b) in (("base_layer.", gate_up(projections)), ("", projections["down"])):
        yield from ((f"{name}lora_A", a.flatten(0, 1)), (f"{name}lora_B", b.permute(1, 2, 0).flatten(1)))


def flat_by_expert(projections):
    for name, (a, b) in (("base_layer.", gate_up(projections)), ("", projections["down"])):
        yield from ((f"{name}lora_A", a.flatten(0, 1)), (f"{name}lora_B", b.permute(1, 0, 2).flatten(1)))


def packed_by_megatron_bridge(projections):
    """PEFT 0.18's two halves, each side joined expert by expert (``_pack_target_parameter_adapter_weights``)."""
    for name, (a, b) in (("base_layer.", gate_up(projections)), ("", projections["down"])):
        yield f"{name}lora_A", torch.cat([one.T for one in b], 0)
        yield f"{name}lora_B", torch.cat([one.T for one in a], 1)


OUTER = ("gatea", "upa", "downb")
UNSLOTH = {"auto_mapping": {"base_model_class": "Qwen3MoeForCausalLM", "unsloth_fixed": True}}
TARGETS = {"target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]}
FORMS = {
    "SGLang": (each_projection, {}, {}),
    "vLLM and Tinker, shared outer": (shared_outer_of_vllm, {"shared": OUTER}, {}),
    "Megatron-Bridge, shared outer": (shared_outer_of_megatron_bridge, {"shared": OUTER}, {}),
    "Megatron-Bridge, shared": (shared_by_all, {"shared": [p + side for p in ALL for side in "ab"]}, {}),
    "Megatron-Bridge, fused": (fused_projections, {"fused": True}, {}),
    "Megatron-Bridge for vLLM": (three_dimensions_of_vllm, {"fused": True}, {}),
    "SkyRL": (flat, {"fused": True}, {"peft_version": None}),
    "Unsloth before 2026.9.6": (flat_by_expert, {"fused": True}, UNSLOTH | TARGETS),
    "Unsloth, by expert": (flat_by_expert, {"fused": True}, {"lora_B_layout": "grouped_by_expert"} | TARGETS),
    "Unsloth": (flat, {"fused": True}, UNSLOTH | {"lora_B_layout": "rank_major"} | TARGETS),
}  # fmt: skip


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("m"), "qwen3_moe", moe_intermediate_size=40, num_hidden_layers=2)


@pytest.mark.parametrize("form", FORMS)
def test_answers(tmp_path, base, form):
    rename, kind, config = FORMS[form]
    lora = random_lora(range(2), 72, 40, **kind)
    adapter = write(tmp_path / "adapter", base, lora, rename, **config)
    wanted, plain = logits(summed(base, lora)), logits(stock(base))
    assert per_token(plain, wanted) > 0.05
    model, report = ours(adapter, base)
    assert per_token(logits(model), wanted) < 2e-5
    assert report.peft == 0 and report.experts == len(open_adapter(adapter).store.infos)


def test_gpt_oss_in_four_bits(tmp_path):
    base = tmp_path / "model"
    tiny_model("gpt_oss", num_local_experts=E).save_pretrained(base)
    config = stock(base).config
    lora = random_lora(range(config.num_hidden_layers), config.hidden_size, config.intermediate_size, fused=True)
    adapter = write(tmp_path / "adapter", base, lora, lists_of_experts)
    wanted = logits(summed(base, lora, interleaved=True))
    assert per_token(logits(stock(base)), wanted) > 0.02
    assert per_token(logits(ours(adapter, base)[0]), wanted) < 2e-5


def test_megatron_bridge(tmp_path, base, kt_log):
    """Its configuration has no version of PEFT; with PEFT's own order the answers would be others."""
    lora = random_lora(range(2), 72, 40, fused=True)
    adapter = write(tmp_path / "adapter", base, lora, packed_by_megatron_bridge)
    config = {
        "peft_type": "LORA", "auto_mapping": None, "base_model_name_or_path": str(base), "bias": "none", "fan_in_fan_out": False,
        "inference_mode": True, "init_lora_weights": True, "lora_alpha": ALPHA, "lora_dropout": 0.0, "modules_to_save": None, "r": R,
        "rank_pattern": {}, "alpha_pattern": {}, "target_modules": [], "task_type": "CAUSAL_LM", "use_dora": False, "use_rslora": False,
        "target_parameters": ["model.layers.0.mlp.experts.down_proj", "model.layers.0.mlp.experts.gate_up_proj"],
    }  # fmt: skip
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    wanted = logits(summed(base, lora))
    assert per_token(logits(ours(adapter, base)[0]), wanted) < 2e-5
    assert "was written by Megatron-Bridge: each expert's columns of lora_B are taken to be neighbors" in kt_log.text
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"lora_B_layout": "rank_major"}))
    assert per_token(logits(ours(adapter, base)[0]), wanted) > 0.05


def test_the_stamp_of_automodel_tells_the_layout(tmp_path):
    """2 I = H, and LoRA on one weight alone."""
    base = make_model(tmp_path / "m", "qwen3_moe", moe_intermediate_size=36, num_hidden_layers=2)
    lora = random_lora(range(2), 72, 36, fused=True)
    for projections in lora.values():
        projections["down"] = tuple(0 * half for half in projections["down"])
    adapter = write(tmp_path / "adapter", base, lora, lambda p: list(flat(p))[:2], peft_version=None, **TARGETS)
    with pytest.raises(KTAdapterError, match="the shapes do not tell"):
        ours(adapter, base)
    (adapter / "automodel_peft_config.json").write_text('{"paramwrapper_layout": "peft-0.19.1"}')
    assert per_token(logits(ours(adapter, base)[0]), logits(summed(base, lora))) < 2e-5


@pytest.mark.parametrize("form", ["Megatron-Bridge, shared outer", "Megatron-Bridge, fused"])
def test_merged_and_verified(tmp_path, form):
    """What is merged is what is computed, and verify's reference is PEFT's reading of each expert."""
    base = make_model(tmp_path / "m", "qwen3_moe", moe_intermediate_size=40, num_hidden_layers=2, dtype=torch.float32)
    rename, kind, config = FORMS[form]
    lora = random_lora(range(2), 72, 40, **kind)
    adapter = write(tmp_path / "adapter", base, lora, rename, **config)
    merge_adapter(base, adapter, tmp_path / "merged")
    assert per_token(logits(stock(tmp_path / "merged")), logits(summed(base, lora))) < 2e-5
    opened = open_adapter(adapter)
    model, _ = ours(adapter, base)
    module = next(m for m in model.modules() if hasattr(m, "info"))
    deltas = _deltas(opened, 1, module.info)
    for projection, (a, b) in lora[1].items():
        assert torch.allclose(deltas(3)[projection], ALPHA / R * (b[3] @ a[3]), atol=1e-6)


def halves(experts=SHAPE.num_experts, rank=3, projection="gate"):
    out, width = SHAPE.projection(projection)
    return torch.randn(experts, rank, width), torch.randn(experts, out, rank)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"gate_proj.lora_A": halves()[0]}, "has no lora_B beside it"),
        ({"gate_proj.lora_A": halves()[0][0], "gate_proj.lora_B": halves()[1]}, r"wanted \[r, in\] and \[out, r\] with one rank r, or of all"),
        ({"gate_proj.lora_A": halves()[0], "gate_proj.lora_B": halves(rank=2)[1]}, "layer 2, all experts, gate_proj: lora_A has shape"),
        ({"gate_proj.lora_A": halves(5)[0], "gate_proj.lora_B": halves(5)[1]}, "LoRA for 5 experts, the model has 4"),
        ({"gate_proj.lora_A": halves(projection="down")[0], "gate_proj.lora_B": halves()[1]}, "LoRA for a weight of 6 x 6"),
        ({"gate_proj.lora_A": halves()[0], "gate_proj.lora_B": halves()[1], "1.gate_proj.lora_A": halves()[0][0],
          "1.gate_proj.lora_B": halves()[1][0]}, "and of single ones too"),
        ({"gate_proj.lora_A": halves()[0], "gate_proj.lora_B": halves()[1], "gate_up_proj.lora_A": halves()[0],
          "gate_up_proj.lora_B": torch.randn(4, 12, 3)}, "LoRA both on gate_up_proj and on gate_proj or up_proj"),
        ({"gate_up_proj.lora_A": halves()[0], "gate_up_proj.lora_B": halves()[1]}, "LoRA for a weight of 6 x 10, the model's is 12 x 10"),
        ({"gate_proj.lora_A": torch.tensor(1.0), "gate_proj.lora_B": halves()[1]}, "lora_A.weight has shape"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(tmp_path, tensors, message):
    named = {f"{EXPERTS.format(layer=2)}.{name}.weight": tensor.contiguous() for name, tensor in tensors.items()}
    with pytest.raises(KTAdapterError, match=message):
        open_adapter(save(tmp_path / "a", named)).check_fits({2: SHAPE})


def test_sizes_without_a_model(tmp_path):
    def named(name, pair):
        return {
            f"{EXPERTS.format(layer=2)}.{name}.lora_{side}.weight": half for side, half in zip("AB", pair, strict=True)
        }

    adapter = open_adapter(
        save(tmp_path / "a", named("gate_proj", halves()) | named("down_proj", halves(projection="down")))
    )
    assert adapter.own_shapes() == {2: SHAPE}
    for unknown in (named("gate_proj", halves(1)), named("gate_up_proj", (halves()[0], torch.randn(4, 12, 3)))):
        with pytest.raises(KTAdapterError, match="a model is needed to read it"):
            open_adapter(save(tmp_path / "b", unknown)).own_shapes()


def test_empty_placeholders(tmp_path):
    """Tinker's for a gate that is not there."""
    tensors = {f"{EXPERTS.format(layer=2)}.w3.lora_{side}.weight": torch.zeros(0) for side in "AB"}
    tensors |= {
        f"{EXPERTS.format(layer=2)}.w1.lora_{side}.weight": half for side, half in zip("AB", halves(), strict=True)
    }
    lora = open_adapter(save(tmp_path / "a", tensors)).read_layer(2, SHAPE)
    assert lora.a["gate"].any() and not lora.a["up"].any()
