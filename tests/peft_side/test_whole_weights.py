"""What an adapter has beside LoRA: whole modules, biases, rows of embeddings. In a chat, merged, and taken away again, against PEFT's own
float32 forward of the model that it trained."""

from __future__ import annotations

import json

import peft
import pytest
import torch
from helpers.chats import chat_model
from helpers.loading import load, logits
from helpers.models import make_model
from helpers.peft_training import CASES, TOKENS, trained
from helpers.references import per_token
from packaging.version import Version
from safetensors import safe_open
from transformers import AutoModelForCausalLM

from llamafactory_kt import KTAdapterError, apply_adapter, switch_adapter
from llamafactory_kt.adapters import open_adapter
from llamafactory_kt.tools.merge import merge_adapter


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    directory = tmp_path_factory.mktemp("bases")
    return {
        tied: make_model(
            directory / str(tied), "qwen3_moe", num_hidden_layers=2, tie_word_embeddings=tied, attention_bias=True
        )
        for tied in (False, True)
    }


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_chat_exchange_and_merge(bases, tmp_path, case, tied):
    base = bases[tied]
    if case == "tokens of both" and tied and Version(peft.__version__) < Version("0.19"):
        pytest.skip("this PEFT does not compute it")
    adapter, reference = trained(base, tmp_path / "adapter", **CASES[case])
    if case == "biases of LoRA's layers" and not any("bias" in name for name in open_adapter(adapter).store.infos):
        pytest.skip("this PEFT does not save them")
    wanted, plain = logits(reference), logits(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32))
    assert per_token(plain, wanted) > 0.05

    model, report = apply_adapter(load(base, "torch", dtype=torch.float32), adapter)
    assert report.peft == report.total
    before = model.state_dict()
    assert per_token(logits(model), wanted) < 1e-5
    switch_adapter(model, None)
    assert per_token(logits(model), plain) < 1e-5
    switch_adapter(model, adapter)
    assert per_token(logits(model), wanted) < 1e-5
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())

    merge_adapter(base, adapter, tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    assert per_token(logits(merged), wanted) < 0.02  # rounded to bfloat16
    together = load(base, "torch", dtype=torch.float32, adapter=str(adapter), merge_adapter=True)
    assert per_token(logits(apply_adapter(together, adapter)[0]), wanted) < 1e-5


@pytest.mark.parametrize(
    "keys",
    [{"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}, {"trainable_token_indices": {"embed_tokens": TOKENS}}],
    ids=["saved", "tokens"],
)  # fmt: skip
def test_tied_weights_under_both_names(bases, tmp_path, keys):
    """``save_embedding_layers: True`` writes the output layer too, which the configuration does not name."""
    adapter, reference = trained(bases[True], tmp_path / "adapter", save=True, **keys)
    model, _ = apply_adapter(load(bases[True], "torch", dtype=torch.float32, adapter=str(adapter)), adapter)
    assert per_token(logits(model), logits(reference)) < 1e-5


def test_untied_checkpoint_in_several_files(tmp_path):
    base = make_model(
        tmp_path / "base", "qwen3_moe", num_hidden_layers=2, tie_word_embeddings=True, max_shard_size="200KB"
    )
    adapter, reference = trained(base, tmp_path / "adapter", modules_to_save=["lm_head"])
    merge_adapter(base, adapter, tmp_path / "merged")
    index = json.loads((tmp_path / "merged" / "model.safetensors.index.json").read_text())["weight_map"]
    with safe_open(tmp_path / "merged" / index["lm_head.weight"], framework="pt") as file:
        assert "lm_head.weight" in file.keys()  # noqa: SIM118 (safe_open is no mapping)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    assert per_token(logits(merged), logits(reference)) < 0.02


@pytest.mark.parametrize("save", ["auto", True])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    "keys",
    [{"modules_to_save": ["embed_tokens", "lm_head"]}, {"target_modules": ["q_proj", "embed_tokens", "lm_head"]}, {"trainable_token_indices": [*TOKENS, 1030]}],
    ids=["saved", "LoRA", "tokens"],
)  # fmt: skip
def test_more_tokens(tmp_path, keys, tied, save):
    """Trained with resize_vocab: in a chat with it, and merged; without it, refused before weights load."""
    base = make_model(tmp_path / "base", "qwen3_moe", num_hidden_layers=1, tie_word_embeddings=tied)
    whole = save is True or "trainable_token_indices" not in keys
    adapter, reference = trained(base, tmp_path / "adapter", tokens=1088, save=save, **keys)
    wanted = logits(reference)
    with pytest.raises(KTAdapterError, match="with more tokens, set resize_vocab"):
        load(base, "torch", adapter=str(adapter))
    plain = load(base, "torch", dtype=torch.float32, adapter=str(adapter), resize_vocab=True)
    plain.resize_token_embeddings(1088, mean_resizing=False)
    model, _ = apply_adapter(plain, adapter)
    shown = slice(None) if whole else slice(0, 1024)  # the rest starts at random, and this file does not have it
    assert per_token(logits(model)[..., shown], wanted[..., shown]) < 1e-5
    if whole:
        merge_adapter(base, adapter, tmp_path / "merged")
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
        assert per_token(logits(merged), wanted) < 0.02


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"modules_to_save": ["lm_head", "nowhere"]}, "says that nowhere was trained as a whole"),
        ({"trainable_token_indices": [17, 1 << 20]}, r"trainable_token_indices has 1048576, the model has 1024 tokens"),
        ({"trainable_token_indices": [17]}, r"wanted \(1, 72\), a row for each"),
    ],
)
def test_what_does_not_go_together(bases, tmp_path, keys, message):
    made = (
        {"trainable_token_indices": [17, 301]}
        if "trainable_token_indices" in keys
        else {"modules_to_save": ["lm_head"]}
    )
    adapter, _ = trained(bases[False], tmp_path / "adapter", **made)
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **keys}))
    with pytest.raises(KTAdapterError, match=message):
        load(bases[False], "torch", adapter=str(adapter))


@pytest.mark.parametrize(
    "keys",
    [{"use_dora": True}, {"lora_bias": True}, {"trainable_token_indices": [17]}],
    ids=lambda keys: next(iter(keys)),
)
def test_what_the_file_does_not_have(bases, tmp_path, keys):
    """PEFT leaves these out when it converts an adapter to plain LoRA, and computes without them; refused before weights load."""
    adapter, _ = trained(bases[False], tmp_path / "adapter")
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **keys}))
    with pytest.raises(KTAdapterError, match="the file is incomplete"):
        load(bases[False], "torch", adapter=str(adapter))


def test_modules_inside_each_other(bases, tmp_path):
    """PEFT saves one weight under the name of two, and cannot load its own file."""
    adapter, _ = trained(
        bases[False], tmp_path / "adapter", modules_to_save=["self_attn", "q_norm"], target_modules=["lm_head"]
    )
    with pytest.raises(KTAdapterError, match=r"self_attn\.q_norm is inside .*self_attn, and modules_to_save has both"):
        load(bases[False], "torch", adapter=str(adapter))


@pytest.mark.parametrize("keys", [{"use_dora": True}, {"lora_bias": True}], ids=lambda keys: next(iter(keys)))
def test_what_the_configuration_does_not_say(bases, tmp_path, keys):
    adapter, _ = trained(bases[False], tmp_path / "adapter", **keys)
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **dict.fromkeys(keys, False)}))
    with pytest.raises(KTAdapterError, match="is no part of this LoRA"):
        load(bases[False], "torch", adapter=str(adapter))


@pytest.mark.parametrize("tied", [False, True])
def test_more_tokens_in_llamafactorys_chat(tmp_path, tied):
    """``add_tokens`` resizes the embeddings by itself."""
    pytest.importorskip("llamafactory.chat")
    base = make_model(tmp_path / "base", "qwen3_moe", num_hidden_layers=1, tie_word_embeddings=tied)
    adapter, reference = trained(base, tmp_path / "adapter", tokens=1088, modules_to_save=["embed_tokens", "lm_head"])
    keys = {"add_tokens": "<one>,<two>", "kt_backend": "torch", "infer_dtype": "float32"}
    model = chat_model(base, adapter, **keys).engine.model
    assert per_token(logits(model), logits(reference)) < 0.02  # the chat computes in bfloat16
