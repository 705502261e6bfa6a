"""Attention: on the native kernels, or with values that PyTorch's fused kernel takes; the result stays the same."""

from __future__ import annotations

import pytest
import torch
from helpers.architectures import tiny_model
from helpers.loading import load
from helpers.marks import needs_native
from helpers.models import make_model
from helpers.references import rel
from transformers import AutoModelForCausalLM

from llamafactory_kt import KTExpertsConfig, optimize_for_inference
from llamafactory_kt.decoding import attention
from llamafactory_kt.native.library import library

IDS = torch.randint(2, 1000, (3, 37), generator=torch.Generator().manual_seed(0))
MASK = torch.ones_like(IDS)
MASK[1, :9] = 0  # a shorter prompt in the batch


@pytest.fixture
def attended(monkeypatch):
    """The head sizes of keys and values in each call of torch's attention."""
    stock, sizes = torch.nn.functional.scaled_dot_product_attention, []

    def spy(query, key, value, **kwargs):
        sizes.append((key.shape[-1], value.shape[-1]))
        return stock(query, key, value, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    return sizes


def answers(model) -> torch.Tensor:
    """Logits of a prompt alone, of a batch with padding, and of a token after it."""
    with torch.inference_mode():
        alone = model(input_ids=IDS[:1]).logits
        prompt = model(input_ids=IDS, attention_mask=MASK, use_cache=True)
        more = torch.cat((MASK, MASK[:, :1] * 0 + 1), dim=1)
        token = model(input_ids=IDS[:, :1], attention_mask=more, past_key_values=prompt.past_key_values)
    return torch.cat([part[:, -5:].float().flatten() for part in (alone, prompt.logits, token.logits)])


@pytest.mark.parametrize("architecture", ["deepseek_v2", "deepseek_v3"])
def test_the_fused_kernel_gets_sizes_that_it_takes(tmp_path, monkeypatch, attended, architecture):
    """Where the native kernels do not compute it."""
    monkeypatch.setattr(attention, "_native", lambda *_: None)
    path = make_model(tmp_path / "model", architecture, dtype=torch.float32)
    stock = answers(AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32))
    assert set(attended) == {(24, 16)}, "or transformers does this itself by now"
    attended.clear()
    model = load(path, "torch", dtype=torch.float32)
    optimize_for_inference(model)
    assert rel(answers(model), stock) < 1e-5
    assert set(attended) == {(24, 24)}


@pytest.mark.parametrize(("architecture", "attention"), [("qwen3_moe", "sdpa"), ("deepseek_v2", "eager")])
def test_others_are_left_alone(tmp_path, architecture, attention):
    """Models whose sizes are equal, and models that were given another implementation."""
    path = make_model(tmp_path / "model", architecture)
    model = AutoModelForCausalLM.from_pretrained(
        path, quantization_config=KTExpertsConfig(backend="torch"), attn_implementation=attention
    )
    optimize_for_inference(model)
    assert model.config._attn_implementation == attention


def test_a_stock_model_in_the_same_process_is_not_touched(tmp_path, attended):
    path = make_model(tmp_path / "model", "deepseek_v2")
    optimize_for_inference(load(path, "torch", dtype=torch.float32))
    stock = AutoModelForCausalLM.from_pretrained(path)
    assert stock.config._attn_implementation == "sdpa"
    answers(stock)
    assert set(attended) == {(24, 16)}


@pytest.mark.parametrize("native", [pytest.param(True, marks=needs_native), False])
def test_sinks_and_windows(tmp_path, monkeypatch, native):
    """gpt-oss, which has an eager attention alone: a prompt longer than the window, a batch with padding, and many tokens after them, on
    the kernels or by the model's own function."""
    made = tiny_model("gpt_oss", sliding_window=6)
    made.save_pretrained(tmp_path)
    stock = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    model = load(tmp_path, "native" if native else "torch", dtype=torch.float32)
    optimize_for_inference(model)
    compute, calls = attention._native, []

    def spy(*given):
        found = compute(*given) if native else None
        calls.append(found is not None)
        return found

    monkeypatch.setattr(attention, "_native", spy)

    def tokens(model):
        found = []
        with torch.inference_mode():
            for rows, mask in ((IDS[:1, :4], None), (IDS, MASK)):
                output = model(input_ids=rows, attention_mask=mask, use_cache=True)
                for number in range(12):
                    found.append(output.logits[:, -1].flatten())
                    mask = None if mask is None else torch.cat((mask, mask[:, :1] * 0 + 1), 1)
                    more = IDS[: len(rows), number : number + 1]
                    output = model(input_ids=more, attention_mask=mask, past_key_values=output.past_key_values)
        return torch.cat(found)

    wanted = tokens(stock)
    assert rel(tokens(model), wanted) < 1e-5
    if not isinstance(library(), str):
        assert set(calls) == {native}
