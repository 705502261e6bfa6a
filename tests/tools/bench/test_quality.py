"""``bench --quality``: its figures against stock transformers in float32 and torch's own losses."""

from __future__ import annotations

import json
import math
import shutil
from types import SimpleNamespace

import pytest
import torch
import yaml
from helpers.adapters import make_adapter
from helpers.children import KT, child
from helpers.models import make_model
from helpers.references import merged_float32
from torch.nn import functional as F
from transformers import AutoTokenizer
from typer.testing import CliRunner

from llamafactory_kt import KTDataError, KTModelError, KTPathError
from llamafactory_kt.cli import app
from llamafactory_kt.integration import chat
from llamafactory_kt.tools.bench.configs import BenchConfig
from llamafactory_kt.tools.bench.quality import QualityResult, Text, worker
from llamafactory_kt.tools.bench.quality.results import TokenFigures
from llamafactory_kt.tools.bench.quality.run import reference_config
from llamafactory_kt.tools.bench.quality.worker import Cut

CONTEXT = 33


def printed(*words):
    """What a command prints as JSON."""
    result = child(KT, *words)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


@torch.no_grad()
def by_hand(model, adapter, chunks):
    """Logits [N, vocabulary] that predict each chunk's last tokens, from stock transformers, and these tokens."""
    stock = merged_float32(model, adapter)
    logits = torch.cat([stock(torch.tensor([chunk])).logits[0, CONTEXT // 2 : -1] for chunk in chunks])
    return logits, torch.cat([torch.tensor(chunk[CONTEXT // 2 + 1 :]) for chunk in chunks])


def test_a_real_run(tmp_path):
    """The checkpoint is in bfloat16, the reference in float32. Without its adapter the model is as far from it as stock says."""
    model = make_model(tmp_path / "model", "qwen3_moe")
    adapter = make_adapter(tmp_path / "adapter", model, scale=0.3)
    keys = {
        "model_name_or_path": str(model), "adapter_name_or_path": str(adapter), "template": "deepseek", "use_kt": True,
        "kt_backend": "torch", "kt_merge_adapter": True,
    }  # fmt: skip
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(keys))
    (tmp_path / "text.txt").write_text(Text.read().content[:900], encoding="utf-8")
    words = [
        "--quality",
        tmp_path / "text.txt",
        tmp_path / "c.yaml",
        "kt_merge_adapter=false",
        "--context",
        CONTEXT,
        "--chunks",
        3,
    ]
    found = printed("bench", *words, "--against", "base", "--json", "-")
    ids = AutoTokenizer.from_pretrained(model)(Text.read().content[:900], add_special_tokens=False).input_ids
    assert found["tokens"] == len(ids) > 4 * CONTEXT and found["chunks"] == 3 and found["predicted"] == 3 * 16
    own, base = found["rows"]
    assert [own["name"], base["name"]] == ["as configured", "base"] and own["engine"].startswith("torch with ")

    chunks = [ids[start : start + CONTEXT] for start in range(0, 3 * CONTEXT, CONTEXT)]
    (wanted, targets), (others, _) = by_hand(model, adapter, chunks), by_hand(model, None, chunks)
    assert found["perplexity"] == pytest.approx(math.exp(F.cross_entropy(wanted, targets)), rel=1e-4)
    assert base["perplexity"] == pytest.approx(math.exp(F.cross_entropy(others, targets)), rel=0.02)
    assert base["perplexity_ratio"] == pytest.approx(base["perplexity"] / found["perplexity"])
    kl = F.kl_div(others.log_softmax(-1), wanted.log_softmax(-1), log_target=True, reduction="batchmean")
    assert base["mean_kld"] == pytest.approx(float(kl), rel=0.05)
    assert 0 < own["mean_kld"] < kl / 50, "bfloat16's rounding, and the adapter"
    assert base["same_top"] < own["same_top"] and own["perplexity_ratio"] == pytest.approx(1, abs=0.02)


def test_figures_are_those_of_torch():
    generator = torch.Generator().manual_seed(0)
    wanted, found = torch.randn(2, 100, 50, generator=generator) * 2
    wanted[:, 7] = -math.inf  # tokens that the model never chooses
    found[:40, 7] = -math.inf
    tokens = torch.randint(8, 50, (100,), generator=generator)
    figures = TokenFigures.of(found.log_softmax(-1), wanted.log_softmax(-1), tokens)
    with_7 = F.kl_div(found.log_softmax(-1), wanted.log_softmax(-1), log_target=True, reduction="none")
    kl = torch.cat([with_7[:, :7], with_7[:, 8:]], 1).sum(-1).double()
    torch.testing.assert_close(torch.tensor(figures.klds, dtype=torch.double), kl, rtol=1e-5, atol=1e-6)
    same = TokenFigures.of(wanted.log_softmax(-1), wanted.log_softmax(-1), tokens)
    assert set(same.klds) == {0} and all(same.same_top)
    halves = [TokenFigures(*(part[:30] for part in figures)), TokenFigures(*(part[30:] for part in figures))]
    reference = F.cross_entropy(wanted, tokens, reduction="none").tolist()
    result = QualityResult.of("x", "y", halves, [reference[:30], reference[30:]])
    assert result.mean_kld == pytest.approx(float(kl.mean()), rel=1e-5)
    assert result.mean_kld_error == pytest.approx(float(kl.std(correction=0)) / 10, rel=1e-5)
    percentiles = torch.quantile(kl, torch.tensor([0.5, 0.9, 0.99, 1.0], dtype=torch.double)).tolist()
    assert [result.median_kld, result.kld_90, result.kld_99, result.max_kld] == pytest.approx(percentiles, rel=1e-5)
    assert result.same_top == float((found.argmax(-1) == wanted.argmax(-1)).double().mean())
    assert result.perplexity == pytest.approx(math.exp(F.cross_entropy(found, tokens)), rel=1e-5)
    ratio = math.exp(F.cross_entropy(found, tokens) - F.cross_entropy(wanted, tokens))
    assert result.perplexity_ratio == pytest.approx(ratio, rel=1e-5)


def test_the_reference_has_the_same_model_and_adapter():
    config = {
        "model_name_or_path": "m", "adapter_name_or_path": "a", "kt_lora_scope": "attention", "kt_backend": "INT4", "kt_load": "mmap",
        "flash_attn": "fa2", "kt_config": {"kt_backend": "AMXINT8", "kt_weight_path": "w", "kt_moe_lora_path": "e"},
    }  # fmt: skip
    same = {
        "model_name_or_path": "m",
        "adapter_name_or_path": "a",
        "kt_lora_scope": "attention",
        "kt_moe_lora_path": "e",
    }
    assert reference_config(config) == same | {"use_kt": True, "kt_backend": "torch"}


class Beginning:
    """A tokenizer of letters that begins texts with a token of its own."""

    bos_token_id = 1

    def __call__(self, text: str, add_special_tokens: bool = True, **_: object) -> SimpleNamespace:
        return SimpleNamespace(input_ids=[1] * add_special_tokens + [*map(ord, text)])


def test_chunks_begin_as_texts_do(tmp_path, monkeypatch):
    monkeypatch.setattr(chat, "load_tokenizer", lambda config: (Beginning(), 50))
    tokens = worker._tokenize(BenchConfig("x", {}), "t", "abcdefghij", Cut(4, 9), tmp_path)
    assert tokens == (10, [[1, *map(ord, "bcd")], [1, *map(ord, "fgh")]])
    assert Cut(4, 9).predicted == 1 and Cut(512, 8).predicted == 255


def test_texts_that_cannot_be_measured(tmp_path, monkeypatch):
    model = make_model(tmp_path / "model", "mixtral")
    keys = {"model_name_or_path": str(model), "template": "deepseek", "use_kt": True, "kt_backend": "torch"}
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(keys))

    def bench(*words: object) -> None:
        result = CliRunner().invoke(app, ["bench", str(tmp_path / "c.yaml"), "--quality", *map(str, words)])
        raise result.exception or AssertionError(result.output)

    for content, wanted in ((b" \n", "is empty; --quality needs a text"), (b"\xff\xfe", "is not a text in UTF-8")):
        (tmp_path / "text.txt").write_bytes(content)
        with pytest.raises(KTDataError, match=wanted):
            bench(tmp_path / "text.txt")
    with pytest.raises(KTPathError, match=r"none.txt: the text to measure on does not exist"):
        bench(tmp_path / "none.txt")
    with pytest.raises(SystemExit):
        bench(tmp_path / "text.txt", tmp_path / "another.txt")

    config, cut = BenchConfig("x", keys), Cut(16, 2)
    tokens = worker._tokenize(config, "t", Text.read().content, cut, tmp_path)
    assert [len(chunk) for chunk in tokens.chunks] == [16, 16] and tokens.total > 1000
    with pytest.raises(KTDataError, match=r"t has \d tokens, fewer than one chunk of 16.*--context"):
        worker._tokenize(config, "t", "Too short.", cut, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
        with pytest.raises(KTDataError, match=r"distributions need .* and .* are free; lower --chunks"):
            worker._tokenize(config, "t", Text.read().content, cut, tmp_path)
    for file in model.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(KTModelError, match="its tokenizer cannot be loaded"):
        worker._tokenize(config, "t", Text.read().content, cut, tmp_path)
