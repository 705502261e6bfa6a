"""How LLaMA-Factory loads a model with use_kt: models that are refused, native classes, and types of fine-tuning."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from helpers.chats import chat_model
from helpers.marks import needs_kernel
from helpers.models import make_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from llamafactory_kt import KTModelError, KTPathError
from llamafactory_kt.checkpoint.opening import open_checkpoint
from llamafactory_kt.model.state import kt_state

SMALL = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 64}


def test_missing_model_and_quantized_model(tmp_path, demo):
    with pytest.raises(KTPathError, match=r"model_name_or_path: .*nowhere does not exist"):
        chat_model(tmp_path / "nowhere")
    path = shutil.copytree(demo / "model", tmp_path / "bitsandbytes")
    config = json.loads((path / "config.json").read_text())
    for value, message in (
        (
            {"quant_method": "bitsandbytes", "load_in_4bit": True},
            r"quant_method: bitsandbytes in config.json of .*bitsandbytes\)",
        ),
        (
            {"quant_method": "gptq", "bits": [4]},
            r"config.json of .*bitsandbytes: quantization_config.bits is \[4\], wanted an",
        ),
        (["fp8"], r"config.json of .*bitsandbytes: quantization_config is \[.fp8.\], wanted an object"),
    ):
        (path / "config.json").write_text(json.dumps(config | {"quantization_config": value}))
        with pytest.raises(KTModelError, match=message):
            chat_model(path)
        with pytest.raises(KTModelError, match=message):
            open_checkpoint(path, quantized=True).layout  # noqa: B018


def test_a_checkpoint_that_says_that_it_is_not_quantized(tmp_path, demo):
    """transformers refuses an empty section."""
    path = shutil.copytree(demo / "model", tmp_path / "plain")
    config = json.loads((path / "config.json").read_text())
    for value in ({}, None):
        (path / "config.json").write_text(json.dumps(config | {"quantization_config": value}))
        kt_state(chat_model(path, kt_backend="torch").engine.model)


def test_dense_model_is_refused_through_llamafactory(tmp_path):
    config = AutoConfig.for_model(
        "llama", **{**SMALL, "vocab_size": 1024}, num_key_value_heads=2, bos_token_id=0, eos_token_id=1
    )
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(tmp_path / "dense")
    for file in make_model(tmp_path / "moe", "mixtral").glob("tokenizer*"):
        shutil.copy(file, tmp_path / "dense")
    with pytest.raises(KTModelError, match="has no routed experts"):
        chat_model(tmp_path / "dense")


REMOTE = {"AutoConfig": "kimi.DeepseekV3Config", "AutoModelForCausalLM": "kimi.DeepseekV3ForCausalLM"}
REMOTE_CODE = """
from transformers import PretrainedConfig


class DeepseekV3Config(PretrainedConfig):
    model_type = "kimi_k2"
"""


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"hidden_act": "nonsense"}, KTModelError, "config.json has hidden_act: 'nonsense'"),
        ({"num_experts_per_tok": 2.5}, KTPathError, "is not a model that can be opened: .*num_experts_per_tok.* expected int"),
        ({"model_type": "kimi_k2", "auto_map": REMOTE}, KTModelError, 'Write "model_type": "deepseek_v2" in config.json'),
    ],
)  # fmt: skip
def test_a_configuration_that_cannot_be_right(tmp_path, demo, changes, error, message):
    path = shutil.copytree(demo / "model", tmp_path / "m")
    (path / "config.json").write_text(json.dumps(json.loads((path / "config.json").read_text()) | changes))
    (path / "kimi.py").write_text(REMOTE_CODE)
    with pytest.raises(error, match=message):
        chat_model(path, trust_remote_code=True)


TOKENIZER_CODE = """
from transformers import PreTrainedTokenizerFast


class OwnTokenizer(PreTrainedTokenizerFast):
    own = True
"""


@needs_kernel
@pytest.mark.parametrize("own_tokenizer", [False, True])
def test_native_classes_in_spite_of_remote_code(tmp_path, demo, own_tokenizer):
    """Old DeepSeek checkpoints ship code for transformers 4, which must not even be imported. A tokenizer that exists
    only as remote code is still used."""
    path = shutil.copytree(demo / "model", tmp_path / "remote")
    config = json.loads((path / "config.json").read_text())
    config["auto_map"] = {
        "AutoConfig": "configuration_deepseek.DeepseekV2Config",
        "AutoModelForCausalLM": "modeling_deepseek.DeepseekV2ForCausalLM",
    }
    (path / "config.json").write_text(json.dumps(config))
    for name in ("modeling_deepseek",) if own_tokenizer else ("configuration_deepseek", "modeling_deepseek"):
        (path / f"{name}.py").write_text("raise RuntimeError('remote code was imported')\n")
    if own_tokenizer:  # transformers imports the remote configuration on its way to such a tokenizer
        code = "from transformers import PretrainedConfig\n\n\nclass DeepseekV2Config(PretrainedConfig):\n    model_type = 'deepseek_v2'\n"
        (path / "configuration_deepseek.py").write_text(code)
        (path / "tokenization_own.py").write_text(TOKENIZER_CODE)
        tokenizer = json.loads((path / "tokenizer_config.json").read_text())
        tokenizer |= {
            "tokenizer_class": "OwnTokenizer",
            "auto_map": {"AutoTokenizer": [None, "tokenization_own.OwnTokenizer"]},
        }
        (path / "tokenizer_config.json").write_text(json.dumps(tokenizer))
    engine = chat_model(path, trust_remote_code=True).engine
    assert type(engine.model).__module__ == "transformers.models.deepseek_v2.modeling_deepseek_v2"
    assert type(engine.model)._auto_class is None and type(engine.model.config)._auto_class is None
    if own_tokenizer:
        type(engine.tokenizer)._auto_class = None  # set by LLaMA-Factory; later tests could not save such a tokenizer
        stock_tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=True)
        assert type(engine.tokenizer).__name__ == type(stock_tokenizer).__name__


@needs_kernel
@pytest.mark.parametrize("finetuning_type", ["lora", "full", "freeze"])
def test_every_finetuning_type_ends_in_kt_experts(demo, finetuning_type):
    model = chat_model(demo / "model", finetuning_type=finetuning_type).engine.model
    assert len(kt_state(model).wrappers) == 3
