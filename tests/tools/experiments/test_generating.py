"""Answering prompts in batches: the answers equal single ones, a run can be resumed, and a failure costs only its own
prompt."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import time

import pytest
import torch
import yaml
from helpers.models import make_model
from typer.testing import CliRunner

from llamafactory_kt import KTConfigError, KTDataError, generate
from llamafactory_kt.cli import app
from llamafactory_kt.integration.chat import LoadedChat
from llamafactory_kt.integration.prompts import make_prompts

TEXTS = ["Hello, who are you?", "什么是 LoRA？", "Tell me a joke.", "你好，请介绍一下你自己。", "什么是混合专家模型？"]


@pytest.fixture(scope="module")
def config(demo):
    return {
        "model_name_or_path": str(demo / "model"), "adapter_name_or_path": str(demo / "adapter"),
        "template": "deepseek", "use_kt": True, "kt_backend": "torch", "do_sample": False, "max_new_tokens": 40,
    }  # fmt: skip


@pytest.fixture(scope="module")
def chat_model(config):
    from llamafactory.chat import ChatModel

    return ChatModel(config)


def test_batched_answers_equal_single_ones(chat_model, config):
    """Compared with LLaMA-Factory's own chat, one prompt at a time. In bfloat16 a tie may go the other way: ties are
    counted, and each must be one, with logits that differ by no more than bfloat16's step."""
    texts = [*TEXTS, *(f"{text} {text}" for text in TEXTS)]
    single = [chat_model.chat([{"role": "user", "content": text}])[0] for text in texts]
    batched = generate(chat_model, texts, batch_size=4)
    ties = 0
    for text, alone, answer in zip(texts, single, batched, strict=True):
        assert answer.prompt_tokens == alone.prompt_length and not answer.error
        if answer.text == alone.response_text:
            assert answer.answer_tokens == alone.response_length and answer.finish_reason == alone.finish_reason
            continue
        ties += 1
        [other] = generate(chat_model, [text])
        place = next(i for i, (a, b) in enumerate(zip(answer.token_ids, other.token_ids, strict=False)) if a != b)
        ids = LoadedChat.of(chat_model).encode(make_prompts([text])[0]).ids
        with torch.inference_mode():
            logits = chat_model.engine.model(torch.tensor([ids + other.token_ids[:place]])).logits[0, -1].float()
        gap = abs(logits[answer.token_ids[place]] - logits[other.token_ids[place]])
        assert gap <= 2**-6 * logits.abs().max(), "not a tie"
    assert ties <= 2
    assert len({answer.text for answer in batched}) > 3, "the demo answers differ"


def test_padding_has_no_part_in_answers(tmp_path):
    """A random model in float32, which has no ties: every token equals the single answer's token."""
    from llamafactory.chat import ChatModel

    path = make_model(tmp_path / "model", "qwen3_moe", dtype=torch.float32)
    keys = {"model_name_or_path": str(path), "template": "deepseek", "use_kt": True, "kt_backend": "torch"}
    model = ChatModel({**keys, "infer_dtype": "float32", "do_sample": False, "max_new_tokens": 10})
    texts = [" ".join(TEXTS[: n + 1]) for n in range(5)]
    single = [generate(model, [text])[0].token_ids for text in texts]
    assert [answer.token_ids for answer in generate(model, texts, batch_size=5)] == single
    assert len(set(map(tuple, single))) == 5


def test_python(chat_model):
    answers = generate(chat_model, [TEXTS[0], [{"role": "user", "content": TEXTS[2]}]], max_new_tokens=3)
    assert [a.answer_tokens for a in answers] == [3, 3] and {a.finish_reason for a in answers} == {"length"}
    assert all(a.ms_per_token > 0 for a in answers)
    with pytest.raises(KTDataError, match="prompt 1: expected instruction"):
        generate(chat_model, ["fine", {"x": 1}])
    with pytest.raises(KTConfigError, match="batch_size must be at least 1"):
        generate(chat_model, ["fine"], batch_size=0)
    sampled = [generate(chat_model, TEXTS, do_sample=True, temperature=1.5, seed=s)[0].text for s in (1, 1, 2)]
    assert sampled[0] == sampled[1]


@pytest.mark.parametrize("module", ["configuration_utils", "modeling_utils"])
def test_the_log_of_a_load(chat_model, module):
    """Nothing of what LLaMA-Factory's own code does."""
    logger, text = logging.getLogger(f"transformers.{module}"), "`torch_dtype` is deprecated! Use `dtype` instead!"
    records = [logger.makeRecord(logger.name, logging.WARNING, "x.py", 1, said, (), None) for said in (text, "weights")]
    assert [bool(logger.filter(record)) for record in records] == [False, True]


def test_a_batch_that_fails_costs_only_the_prompt_that_fails(chat_model, monkeypatch):
    model, tokenizer = chat_model.engine.model, chat_model.engine.tokenizer
    stock = model.generate

    def failing(*args, **keys):
        ids = next(value for value in (*args, *keys.values()) if isinstance(value, torch.Tensor))
        if any("joke" in text for text in tokenizer.batch_decode(ids)):
            raise RuntimeError("too long")
        return stock(*args, **keys)

    monkeypatch.setattr(model, "generate", failing)
    answers = generate(chat_model, TEXTS, max_new_tokens=3, batch_size=5)
    assert [bool(a.error) for a in answers] == [False, False, True, False, False]
    assert answers[2].error == "RuntimeError: too long"


def write(tmp_path, config, rows):
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    (tmp_path / "prompts.jsonl").write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in rows) + "\n")
    return [
        "generate", str(tmp_path / "config.yaml"), "--input", str(tmp_path / "prompts.jsonl"),
        "--output", str(tmp_path / "answers.jsonl"),
    ]  # fmt: skip


def test_resumed_after_a_kill(tmp_path, config):
    """A real run is killed after its first batches; their answers are not computed again."""
    words = write(
        tmp_path, config, [{"id": f"q{n}", "instruction": f"{text} {n}"} for n in range(12) for text in TEXTS]
    )
    output = tmp_path / "answers.jsonl"
    process = subprocess.Popen([sys.executable, "-m", "llamafactory_kt", *words, "--batch-size", "1"],
                               env=os.environ, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # fmt: skip
    deadline = time.monotonic() + 200
    while not (output.is_file() and output.read_text().count("\n") >= 3) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.kill()
    process.wait()
    before = [json.loads(line) for line in output.read_text().split("\n")[:-1]]
    assert 3 <= len(before) < 60
    result = CliRunner().invoke(app, [*words, "--batch-size", "16"])
    assert result.exit_code == 0, result.output
    after = [json.loads(line) for line in output.read_text().splitlines()]
    assert [line["index"] for line in after] == list(range(60)) and after[0]["id"] == "q0"
    assert {json.dumps(line) for line in before} <= {json.dumps(line) for line in after}
    assert f"({len(before)} were there)" in result.output.replace("\n", " ")


def test_lines_that_are_malformed(tmp_path, config):
    """They give errors in their own lines, the others are answered, and the exit code tells. A second run with nothing
    to do loads nothing."""
    rows = [{"instruction": TEXTS[0]}, "{not json", {"messages": "no list"}, "", {"instruction": TEXTS[2]}]
    words = write(tmp_path, config, rows)
    result = CliRunner().invoke(app, [*words[:2], "max_new_tokens=4", *words[2:]])
    assert result.exit_code == 1 and "2 of 4 prompts answered (0 were there), 2 failed" in result.output
    lines = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert ["answer" in line for line in lines] == [True, False, False, True]
    assert lines[1]["error"].startswith("not valid JSON") and "list of messages" in lines[2]["error"]
    assert lines[0]["answer_tokens"] == 4, "key=value takes precedence"
    with pytest.raises(KTConfigError, match="infer_backend: vllm cannot be used here"):
        LoadedChat.load({**config, "infer_backend": "vllm"})
    with pytest.raises(KTConfigError, match="The configuration: Please provide `model_name_or_path`"):
        LoadedChat.load({"template": "deepseek"})
