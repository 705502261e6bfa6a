"""``verify``'s look at all but the routed experts: it passes what is right, and names what is wrong. The reference is PEFT's own."""

from __future__ import annotations

import pytest
import torch
from helpers.adapters import make_adapter
from helpers.loading import load
from helpers.models import make_model
from helpers.peft_training import CASES, trained

from llamafactory_kt import apply_adapter
from llamafactory_kt.adapters import open_adapters
from llamafactory_kt.adapters.config import LoraSettings
from llamafactory_kt.model.state import plain_model
from llamafactory_kt.tools.verify import record_inputs, verify_dense, verify_layers
from llamafactory_kt.tools.verify.reference import Reference


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    directory = tmp_path_factory.mktemp("base")
    return make_model(directory, "qwen3_moe", num_hidden_layers=2, tie_word_embeddings=True, attention_bias=True)


def loaded(base, adapter, **keys):
    return apply_adapter(load(base, "auto", adapter=str(adapter), **keys), adapter)[0]


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize(
    "case",
    [
        "embeddings saved",
        "LoRA on embeddings",
        "tokens",
        "norms and routers saved",
        "biases of B",
        "DoRA, and a module saved",
    ],
)
def test_right(base, tmp_path, case, merged):
    adapter, _ = trained(base, tmp_path / "adapter", **CASES[case])
    found = verify_dense(loaded(base, adapter, merge_adapter=merged), base, open_adapters(adapter))
    assert not found.problems and len(found.modules) >= 4 and found.base == (0 if merged else 28)


def scaled(model):
    model.get_submodule("model.layers.1.self_attn.q_proj").scaling["default"] *= 2


def router(model):
    with torch.no_grad():
        model.get_submodule("model.layers.0.mlp.gate").weight.mul_(1.1)


def norm(model):
    with torch.no_grad():
        model.get_submodule("model.norm").weight[3] += 1


def embedding(model):
    with torch.no_grad():
        model.get_submodule("model.embed_tokens").weight[40:60] *= 1.1


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (scaled, "model.layers.1.self_attn.q_proj: the effect of LoRA has strength 2"),
        (router, "model.layers.0.mlp.gate: "),
        (norm, "model.norm.weight: without the adapter it is not the checkpoint's"),
        (embedding, "model.embed_tokens: with LoRA the output is off by"),
    ],
    ids=["scaling", "saved router", "base of a norm", "saved embeddings"],
)
def test_wrong(base, tmp_path, spoil, message):
    adapter, _ = trained(base, tmp_path / "adapter", modules_to_save=["mlp.gate", "embed_tokens"])
    model = loaded(base, adapter)
    spoil(plain_model(model))
    assert [message in problem for problem in verify_dense(model, base, open_adapters(adapter)).problems] == [True]


def test_a_wrong_reading_of_the_adapter(base, tmp_path, monkeypatch):
    """Neither experts nor all else are compared with what this package takes the configuration for."""
    adapter = make_adapter(tmp_path / "adapter", base, alpha_pattern={"q_proj": 3, r"experts\.\d+\.up_proj": 5})
    monkeypatch.setattr(LoraSettings, "alpha", lambda self, module: self.lora_alpha)
    model = loaded(base, adapter)
    problems = verify_dense(model, base, open_adapters(adapter)).problems
    assert len(problems) == 2 and all("q_proj: the effect of LoRA has strength" in problem for problem in problems)
    inputs = record_inputs(model, range(2, 40))
    assert all(result.problem for result in verify_layers(model, inputs, Reference(base, open_adapters(adapter))))
