"""Rows with pictures in ``generate``, ``stats`` and ``compare``: the chat's answers, and stock transformers' distributions."""

from __future__ import annotations

import json
import math

import pytest
import torch
from helpers.chats import chat_model
from helpers.image_text import ARCHITECTURES, make_image_text_model, picture, prompt
from transformers import AutoModelForImageTextToText, AutoProcessor

from llamafactory_kt.integration.chat import LoadedChat
from llamafactory_kt.integration.prompts import read_prompts
from llamafactory_kt.router_stats.stats import get_router_stats, reset_router_stats
from llamafactory_kt.tools.experiments.generating import answer_all
from llamafactory_kt.tools.experiments.measuring import log_probs

PICTURES = {"a.png": picture(), "b.png": picture(64, 48, 1)}
ROWS = [
    {"instruction": "<image>What is it?", "images": ["a.png"], "output": "A cat."}, {"instruction": "Hello."},
    {
        "messages": [{"role": "user", "content": "<image> or <image>?"}, {"role": "assistant", "content": "Both."}],
        "images": ["b.png", "a.png"],
    },
    {"instruction": "Tell me a joke."}, {"instruction": "<image><image>?", "images": ["a.png"]},
]  # fmt: skip


@pytest.fixture(scope="module", params=["qwen3_vl_moe", "gemma4"])
def chat(request, tmp_path_factory):
    path = make_image_text_model(tmp_path_factory.mktemp("model"), request.param, dtype=torch.float32)
    keys = {
        "template": ARCHITECTURES[request.param].template,
        "kt_backend": "torch",
        "kt_router_stats": True,
        "max_new_tokens": 6,
    }
    return LoadedChat.of(chat_model(path, **keys)), path, request.param


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rows")
    for name, shown in PICTURES.items():
        shown.save(folder / name)
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    return read_prompts(folder / "rows.jsonl")


def test_answers_are_the_chats(chat, rows):
    loaded, _, _ = chat
    single = []
    for row in rows[:4]:
        keys = {"images": [PICTURES[name] for name in ROWS[row.index]["images"]]} if row.media else {}
        single.append(loaded.engine._chat(*(getattr(loaded.engine, name) for name in ("model", "tokenizer", "processor", "template", "generating_args")), [dict(m) for m in row.messages], input_kwargs={}, **keys)[0])  # fmt: skip
    reset_router_stats(loaded.model)
    answers = {answer.index: answer for batch in answer_all(loaded, rows, batch_size=4) for answer in batch}
    assert "(<image>) in the messages: 2; images that came with them: 1" in answers.pop(4).error
    for alone, answer in zip(single, (answers[index] for index in range(4)), strict=True):
        assert (answer.text, answer.prompt_tokens) == (alone.response_text, alone.prompt_length) and not answer.error
    counted = next(iter(get_router_stats(loaded.model).values()))
    assert counted.prompt_tokens == sum(answer.prompt_tokens for answer in answers.values())


def test_distributions_are_stocks(chat, rows):
    """Along an answer, from the processor's own inputs."""
    loaded, path, architecture = chat
    stock, processor = AutoModelForImageTextToText.from_pretrained(path).eval(), AutoProcessor.from_pretrained(path)
    for row in (rows[0], rows[2]):
        answer = loaded.encode_reference(row)
        shown = [PICTURES[name] for name in ROWS[row.index]["images"]]
        text = prompt(architecture, row.text) + loaded.tokenizer.decode(answer)
        given = processor(text=[text], images=shown, return_tensors="pt")
        assert given["input_ids"][0, -len(answer) :].tolist() == answer
        with torch.inference_mode():
            wanted = stock(**given).logits[0, -len(answer) - 1 : -1].log_softmax(-1)
        found = log_probs(loaded, row, answer)
        assert torch.allclose(found, wanted, atol=1e-4), float((found - wanted).abs().max())
        assert math.isfinite(float(found.min()))
