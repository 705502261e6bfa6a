"""Router statistics, compared with what the routers of stock transformers choose for the same tokens."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch
from helpers.adapters import make_adapter
from helpers.models import make_model
from helpers.references import merged_float32
from transformers import AutoModelForCausalLM, GenerationConfig

from llamafactory_kt import (
    KTExpertsConfig,
    KTModelError,
    apply_adapter,
    get_router_stats,
    print_router_stats,
    reset_router_stats,
)
from llamafactory_kt.router_stats.stats import LayerStats

PAD = 1
ENDS = GenerationConfig(max_new_tokens=6, do_sample=False, pad_token_id=PAD, eos_token_id=[1])


def load(path, **keys):
    config = KTExpertsConfig(backend="torch", router_stats=True, **keys)
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, quantization_config=config)


class Recorder:
    """What a stock model's routers pass to its experts, call by call."""

    def __init__(self, model):
        self.calls: dict[int, list] = {}
        for name, module in model.named_modules():
            if name.endswith(".experts"):
                layer = int(name.split(".layers.")[1].split(".")[0])
                module.register_forward_pre_hook(
                    lambda _, args, layer=layer: self.calls.setdefault(layer, []).append((args[1], args[2]))
                )

    def sums(self, layer, experts, rows=lambda call, index: slice(None), calls=slice(None)):
        counts, weights = np.zeros(experts, np.int64), np.zeros(experts)
        for number, (index, scores) in list(enumerate(self.calls[layer]))[calls]:
            keep = rows(number, index)
            for expert, score in zip(index[keep].flatten().tolist(), scores[keep].flatten().tolist(), strict=True):
                counts[expert] += 1
                weights[expert] += score
        return counts, weights


@pytest.mark.parametrize("architecture", ["deepseek_v2", "qwen3_moe", "mixtral"])
def test_counts_equal_stock_routers(tmp_path, architecture):
    """A prompt and a greedy answer are counted separately, with the adapter in place."""
    path = make_model(tmp_path / "model", architecture)
    adapter = make_adapter(tmp_path / "adapter", path)
    model, _ = apply_adapter(load(path, adapter=str(adapter)), adapter)
    stock = merged_float32(path, adapter)
    recorder, ids = Recorder(stock), torch.arange(40, 57)[None]
    with torch.inference_mode():
        wanted = stock.generate(ids, generation_config=ENDS)
        found = model.generate(inputs=ids, attention_mask=torch.ones_like(ids), generation_config=ENDS)
    assert torch.equal(found, wanted)
    stats = get_router_stats(model)
    assert set(stats) == set(recorder.calls) and stats
    for layer, entry in stats.items():
        counts, weights = recorder.sums(layer, 6, calls=slice(1))
        assert entry.prompt_counts.tolist() == counts.tolist() and entry.prompt_tokens == 17
        np.testing.assert_allclose(entry.prompt_weights, weights, rtol=1e-4)
        counts, weights = recorder.sums(layer, 6, calls=slice(1, None))
        assert entry.answer_counts.tolist() == counts.tolist() and counts.sum() > 0
        np.testing.assert_allclose(entry.answer_weights, weights, rtol=1e-4)
        assert entry.counts.sum() == 3 * entry.tokens


def test_router_logits_give_the_same(tmp_path):
    """Where transformers itself returns router logits: softmax and top-k of them."""
    path = make_model(tmp_path / "model", "mixtral")
    stock, ids = merged_float32(path, None), torch.arange(40, 70).reshape(2, 15)
    with torch.inference_mode():
        logits = stock(ids, output_router_logits=True).router_logits
        model = load(path)
        model(ids)  # by position
    for layer, scores in enumerate(logits):
        chosen = scores.reshape(-1, 6).topk(3).indices
        assert get_router_stats(model, layer).counts.tolist() == torch.bincount(chosen.flatten(), minlength=6).tolist()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    path = make_model(tmp_path_factory.mktemp("stats") / "model", "qwen3_moe")
    return path, load(path)


def prompts():
    """Two prompts of different lengths, left-padded."""
    ids = torch.full((2, 12), PAD)
    ids[0], ids[1, 5:] = torch.arange(40, 52), torch.arange(60, 67)
    return ids, (ids != PAD).long()


def test_padding_is_not_counted(tiny):
    _, model = tiny
    ids, mask = prompts()
    ends = GenerationConfig(max_new_tokens=5, min_new_tokens=5, do_sample=False, pad_token_id=PAD, eos_token_id=[1])
    singles = {}
    with torch.inference_mode():
        for together in (False, True):
            reset_router_stats(model)
            if together:
                model.generate(ids, attention_mask=mask, generation_config=ends)
            else:
                for row in range(2):
                    alone = ids[row][mask[row] == 1][None]
                    model.generate(alone, attention_mask=torch.ones_like(alone), generation_config=ends)
            singles[together] = get_router_stats(model)
    for layer, entry in singles[True].items():
        assert entry.prompt_tokens == 19 and entry.tokens == 19 + 2 * 4
        assert entry.counts.tolist() == singles[False][layer].counts.tolist()
        np.testing.assert_allclose(entry.weights, singles[False][layer].weights, rtol=1e-4)


def test_rows_that_have_ended_are_not_counted(tiny):
    """One row ends at its first token, which is made the end token; the other goes on."""
    _, model = tiny
    ids, mask = prompts()
    plain = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": PAD}
    with torch.inference_mode():
        free = model.generate(ids, attention_mask=mask, generation_config=GenerationConfig(**plain, eos_token_id=[1]))
        first, other = free[0, 12], free[1, 12:]
        assert first not in other, "the rows answer differently"
        reset_router_stats(model)
        config = GenerationConfig(**plain, eos_token_id=[int(first)])
        model.generate(ids, attention_mask=mask, generation_config=config)
    for entry in get_router_stats(model).values():
        assert entry.tokens - entry.prompt_tokens == 5, "only the row that goes on"


def test_threads_and_reset(tiny):
    _, model = tiny
    ids = torch.arange(40, 57)[None]
    reset_router_stats(model)

    def run():
        with torch.inference_mode():
            for _ in range(5):
                model(input_ids=ids)

    threads = [threading.Thread(target=run, daemon=True) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    many = get_router_stats(model)
    reset_router_stats(model)
    assert all(entry.tokens == 0 and not entry.counts.any() for entry in get_router_stats(model).values())
    with torch.inference_mode():
        model(input_ids=ids)
    for layer, entry in get_router_stats(model).items():
        assert many[layer].counts.tolist() == (20 * entry.counts).tolist()


def test_balance_and_variance_as_users_know_them(tiny, capsys):
    def stats(*counts):
        zeros = np.zeros(len(counts))
        return LayerStats(5, sum(counts) // 2, 0, zeros.astype(int), np.array(counts), zeros, zeros)

    even, uneven, few = stats(8, 8, 8, 8), stats(100, 0, 0, 0), stats(4, 0, 0, 0)
    assert even.balance.tolist() == [1, 1, 1, 1] and even.variance == 0 and even.warning is None
    assert uneven.balance.tolist() == [4, 0, 0, 0] and uneven.idle == [1, 2, 3]
    assert uneven.warning == "Expert load balance variance: 1875.0 (high variance)"
    assert few.warning is None, "too few tokens to tell"
    assert stats(0, 0).balance.tolist() == [0, 0]
    print_router_stats(tiny[1])
    assert "busiest experts" in capsys.readouterr().out


def test_what_is_not_counted_says_so(tiny, tmp_path):
    path, model = tiny
    with pytest.raises(KTModelError, match="layer 7 is not a MoE layer; those of this model are 0, 1, 2"):
        get_router_stats(model, 7)
    off = AutoModelForCausalLM.from_pretrained(path, quantization_config=KTExpertsConfig(backend="torch"))
    with pytest.raises(KTModelError, match="kt_router_stats: true"):
        get_router_stats(off)
