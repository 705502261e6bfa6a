"""Stock transformers with the adapter merged, which ``bench --against stock`` measures."""

from __future__ import annotations

import accelerate
import pytest
import torch
from helpers.adapters import make_adapter
from helpers.image_text import make_image_text_model
from helpers.models import make_model
from helpers.references import merged_float32
from transformers import AutoModelForCausalLM
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from llamafactory_kt import KTModelError
from llamafactory_kt.adapters import open_adapters
from llamafactory_kt.integration.chat import LoadedChat
from llamafactory_kt.integration.model.loader import for_text_alone
from llamafactory_kt.tools.bench import stock
from llamafactory_kt.tools.bench.memory import ModelBytes
from llamafactory_kt.tools.bench.stock import FastestExperts, merge_into


@torch.no_grad()
def test_stock_with_the_adapter_merged(tmp_path, monkeypatch):
    """The experts are the float32 sum rounded once, bit by bit; the rest is PEFT's merge in bfloat16."""
    model = make_model(tmp_path / "model", "deepseek_v2")
    adapters = [make_adapter(tmp_path / f"a{r}", model, rank=r, alpha=7, skip_layers=(r - 3,), seed=r) for r in (4, 5)]
    wanted = merged_float32(model, adapters, dtype=torch.bfloat16)
    stock = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
    before = {name: weight.clone() for name, weight in stock.state_dict().items()}
    merged = merge_into(stock, open_adapters(adapters))
    assert type(merged) is type(stock)
    found, changed = merged.state_dict(), 0
    for name, weight in wanted.state_dict().items():
        if ".experts." in name:
            assert torch.equal(found[name], weight), name
        else:
            torch.testing.assert_close(found[name], weight, rtol=0.02, atol=0.02)
        changed += not torch.equal(found[name], before[name])
    assert changed == len(
        [n for n in found if "norm" not in n and "embed" not in n and "lm_head" not in n and "gate.weight" not in n]
    )

    implementations = ALL_EXPERTS_FUNCTIONS.valid_keys()
    monkeypatch.setattr(type(ALL_EXPERTS_FUNCTIONS), "valid_keys", lambda _: [*implementations, "made for others"])
    best = FastestExperts(merged, [5, 9])
    assert set(best.best) == {1, 5, 9}
    assert set(best.best.values()) <= {"eager", "grouped_mm", "batched_mm"}, "without what cannot run here"
    best.best[5] = "batched_mm"
    best(5)
    assert merged.config._experts_implementation == "batched_mm"


@torch.no_grad()
def test_stock_that_a_gpu_does_not_hold(tmp_path, monkeypatch):
    """accelerate's own hooks copy each layer's weights, to the CPU itself; only its choice of another device is not made here.

    Not with DeepSeek-V2, whose routers transformers computes past these hooks, so that stock answers nonsense.
    """
    path = make_model(tmp_path / "model", "qwen3_moe")
    adapter = make_adapter(tmp_path / "adapter", path)
    whole = merge_into(AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16), open_adapters([adapter]))
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
    ids = torch.arange(2, 20)[None]
    unlike = model(input_ids=ids).logits
    sizes = ModelBytes.of(model)

    def dispatch(model, places, **_):
        assert places == {"lm_head": 0, "model": "cpu"}
        accelerate.cpu_offload(model.model, execution_device=torch.device("cpu"))

    monkeypatch.setattr(accelerate, "dispatch_model", dispatch)
    model.hf_device_map = {"lm_head": 0, "model": "cpu"}
    dispatch(model, model.hf_device_map)
    merged = merge_into(model, open_adapters([adapter]))
    assert {weight.is_meta for weight in merged.model.layers[1].mlp.experts.parameters()} == {True}
    logits = merged(input_ids=ids).logits
    assert torch.equal(logits, whole(input_ids=ids).logits) and not torch.equal(logits, unlike)
    copied = ModelBytes.of(merged)
    assert copied.weights == sizes.weights and copied.others_per_token == sizes.others_per_token
    assert copied.experts_per_token == sizes.experts_per_token * 6 // 3, "all experts are copied, not only those chosen"

    model.hf_device_map["model"] = "disk"
    with pytest.raises(KTModelError, match=r"leaves a part of it on disk.*without --against stock"):
        merge_into(model, open_adapters([adapter]))


def test_image_text_models_are_measured_with_text(tmp_path):
    """LLaMA-Factory refuses their Conv3d with torch 2.9, and does so again afterwards."""
    path = make_image_text_model(tmp_path / "model", "qwen3_vl_moe")
    keys = {"model_name_or_path": str(path), "template": "qwen3_vl_nothink"}
    with for_text_alone():
        model = LoadedChat.load(keys).model
    assert isinstance(model.model.visual.patch_embed.proj, torch.nn.Conv3d)
    if torch.__version__.startswith("2.9."):
        with pytest.raises(ValueError, match="Conv3D"):
            LoadedChat.load(keys)


def test_a_slow_implementation_is_timed_once(monkeypatch, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(make_model(tmp_path / "model", "deepseek_v2"))
    calls: list[int] = []
    model.register_forward_pre_hook(lambda _, __, given: calls.append(given["input_ids"].shape[1]), with_kwargs=True)
    with monkeypatch.context() as few:
        few.setattr(type(ALL_EXPERTS_FUNCTIONS), "valid_keys", lambda _: [])
        assert FastestExperts(model, [5]).best == {5: "eager", 1: "eager"}
    assert calls == [5] * 3 + [1] * 9
    calls.clear()
    monkeypatch.setattr(stock, "TIME_LIMIT", 1e-9)
    best = FastestExperts(model, [5])
    assert set(best.best) == {1, 5}
    prompt = calls.count(5)  # newer transformers have more implementations
    assert prompt >= 3 and calls == [5] * prompt + [1] * prompt, "once for each implementation, the slow ones too"
