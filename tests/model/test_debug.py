"""What kt_debug adds to a forward."""

from __future__ import annotations

import json
import re

import pytest
import torch
from helpers.marks import ENGINES
from helpers.models import make_model
from transformers import AutoModelForCausalLM, GenerationConfig

from llamafactory_kt import KTExpertsConfig
from llamafactory_kt.model.debug import NotFiniteError
from llamafactory_kt.model.state import kt_state

IDS = torch.arange(40, 57)[None]


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("debug") / "model", "qwen3_moe")


def load(path, engine="torch", **keys):
    config = KTExpertsConfig(backend=engine, debug=True, router_stats=True, **keys)
    return AutoModelForCausalLM.from_pretrained(path, quantization_config=config)


@torch.inference_mode()
def test_steps_are_logged_and_traced(path, tmp_path, kt_log, capsys):
    model = load(path, debug_dir=str(tmp_path / "debug"))
    chosen = []
    for wrapper in kt_state(model).wrappers:
        wrapper.register_forward_pre_hook(lambda module, args: chosen.append((module.layer_idx, args[1], args[2])))
    config = GenerationConfig(max_new_tokens=3, min_new_tokens=3, do_sample=False, pad_token_id=1)
    plain = AutoModelForCausalLM.from_pretrained(path, quantization_config=KTExpertsConfig(backend="torch"))
    found, wanted = (
        m.generate(IDS, attention_mask=torch.ones_like(IDS), generation_config=config) for m in (model, plain)
    )
    assert torch.equal(found, wanted), "it only looks"
    debugger = kt_state(model).wrappers[0].debugger
    assert "3 steps, 19 tokens" in debugger.summary()
    debugger.close()
    assert "DEBUG profile: 3 steps" in kt_log.text and "DEBUG step" not in capsys.readouterr().err
    text = (tmp_path / "debug" / "steps.log").read_text()
    for line in ("DEBUG step 1, layer 2: 17 tokens, transfer", "DEBUG step 3: 1 tokens"):
        assert line in text
    for part in ("experts", "router", "rest"):
        assert sum(map(float, re.findall(rf"{part} ([\d.]+)[,)]", text))) > 0, part
    load(path)(IDS)
    assert "DEBUG step 1: 17 tokens" in capsys.readouterr().err
    lines = [json.loads(line) for line in (tmp_path / "debug" / "experts.jsonl").read_text().splitlines()]
    rows = [
        (layer, i, s) for layer, index, weights in chosen for i, s in zip(index.tolist(), weights.tolist(), strict=True)
    ]
    assert [(line["layer"], line["experts"]) for line in lines] == [row[:2] for row in rows]
    assert lines[0]["weights"] == pytest.approx(rows[0][2], abs=1e-6) and lines[-1]["step"] == 3
    for kind in ("prompt", "answer"):
        assert json.loads((tmp_path / "debug" / f"trace_{kind}.json").read_text())["traceEvents"]


@pytest.mark.parametrize("engine", ENGINES)
@torch.inference_mode()
def test_the_expert_that_is_not_finite_is_named(path, engine):
    """One expert's weights are spoilt; the message names its layer, the expert, and the first token that goes there."""
    model = load(path, engine)
    wrapper, found = kt_state(model).wrappers[1], []
    hook = wrapper.register_forward_pre_hook(lambda _, args: found.append(args[1]))
    model(IDS)
    hook.remove()
    expert = int(found[0][5, 0])
    token = int((found[0] == expert).any(-1).nonzero()[0, 0])
    real = wrapper.engine.forward

    def spoilt(hidden, index, weights):
        out = real(hidden, index, weights)
        out[(index == expert).any(-1)] = float("nan")
        return out

    wrapper.engine.forward = spoilt
    with pytest.raises(
        NotFiniteError, match=f"layer 1, expert {expert}: nan in its output, first at token {token} of 17"
    ):
        model(IDS)
    wrapper.engine.forward = real
    embeddings = model.get_input_embeddings()(IDS)
    embeddings[0, 3, 0] = float("inf")
    with pytest.raises(NotFiniteError, match=r"layer 0: nan in the (input of the experts|routing weights)"):
        model(inputs_embeds=embeddings)
