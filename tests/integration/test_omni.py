"""Qwen3-Omni: LLaMA-Factory chats with the part that thinks, and so does use_kt; the part that talks is neither built nor read."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
import transformers
from helpers.adapters import edit_adapter, make_adapter
from helpers.chats import chat_model
from helpers.image_text import ARCHITECTURES, make_tokenizer, picture, prompt
from helpers.references import merged_float32
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoProcessor

from llamafactory_kt.checkpoint.opening import open_checkpoint
from llamafactory_kt.model.state import kt_state

TOKENS = {
    "image": "<|image_pad|>", "video": "<|video_pad|>", "audio": "<|audio_pad|>", "vision_bos": "<|vision_start|>",
    "vision_eos": "<|vision_end|>", "audio_bos": "<|audio_start|>", "audio_eos": "<|audio_end|>",
}  # fmt: skip
AUDIO = {
    "num_mel_bins": 16, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 32, "d_model": 32, "output_dim": 64,
    "downsample_hidden_size": 8,
}  # fmt: skip


@pytest.fixture(scope="module")
def omni(tmp_path_factory):
    """A checkpoint of a whole model, with stand-ins for the talker's weights; and the stock thinker."""
    path = tmp_path_factory.mktemp("omni")
    likeness = ARCHITECTURES["qwen3_vl_moe"]
    tokenizer = make_tokenizer(
        ["<|im_start|>", "<|im_end|>", *TOKENS.values()], {f"{name}_token": token for name, token in TOKENS.items()}
    )
    names = {
        "vision_bos": "vision_start",
        "vision_eos": "vision_end",
        "audio_bos": "audio_start",
        "audio_eos": "audio_end",
    }
    ids = {
        f"{names.get(name, name)}_token_id": tokenizer.convert_tokens_to_ids(token) for name, token in TOKENS.items()
    }
    thinker = {
        "text_config": likeness.text_config(),
        "vision_config": likeness.vision_config(),
        "audio_config": AUDIO,
        **ids,
    }
    torch.manual_seed(0)
    model = transformers.Qwen3OmniMoeForConditionalGeneration(
        AutoConfig.for_model("qwen3_omni_moe", thinker_config=thinker, enable_audio_output=False)
    ).float()
    with torch.no_grad():
        for parameter in (p for p in model.parameters() if p.dim() >= 2):
            parameter.normal_(0, parameter[0].numel() ** -0.5 if parameter.dim() > 3 else parameter.shape[-1] ** -0.5)
    model.save_pretrained(path)
    sizes = {
        "patch_size": 8,
        "merge_size": 2,
        "temporal_patch_size": 2,
        "size": {"shortest_edge": 1024, "longest_edge": 2**18},
    }
    transformers.Qwen3OmniMoeProcessor(
        transformers.Qwen2VLImageProcessor(**sizes), transformers.Qwen2VLVideoProcessor(**sizes),
        transformers.WhisperFeatureExtractor(feature_size=16), tokenizer,
    ).save_pretrained(path)  # fmt: skip
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "enable_audio_output": True}))
    file = path / "model.safetensors"
    talker = {"talker.model.layers.0.mlp.experts.0.gate_proj.weight": torch.ones(8, 16)}
    save_file({**load_file(file), **talker}, file, metadata={"format": "pt"})
    return path, model.thinker.eval()


def test_pictures_and_adapters(omni, tmp_path):
    path, stock = omni
    pictures, question = [picture(), picture(64, 48, 1)], "<image>What is it, and <image>?"
    given = AutoProcessor.from_pretrained(path)(
        text=[prompt("qwen3_vl_moe", question)], images=pictures, return_tensors="pt"
    )

    @torch.inference_mode()
    def answer(model) -> list[int]:
        return model.generate(**given, max_new_tokens=8, do_sample=False)[0, given["input_ids"].shape[1] :].tolist()

    base = answer(stock)
    thinker = tmp_path / "thinker"
    stock.save_pretrained(thinker)
    adapter = make_adapter(tmp_path / "a", thinker, rank=3, scale=3)
    ours = chat_model(path, template="qwen3_omni_nothink", kt_backend="torch")
    assert type(ours.engine.model) is type(stock) and len(kt_state(ours.engine.model).wrappers) == 3
    assert answered(ours, question, pictures) == base

    with_lora = answer(merged_float32(thinker, adapter))
    assert with_lora != base
    for change in (lambda name: name, lambda name: name.replace("base_model.model.", "base_model.model.thinker.")):
        edit_adapter(adapter, lambda tensors, change=change: {change(name): value for name, value in tensors.items()})
        ours = chat_model(path, adapter, template="qwen3_omni_nothink", kt_backend="torch")
        report = kt_state(ours.engine.model).report
        assert report.peft + report.experts == report.total
        assert answered(ours, question, pictures) == with_lora
    opened = open_checkpoint(path)
    assert len(opened.experts) == 3 and opened.layout.dtypes() == {"F32"}, "commands see the same experts"


def test_how_the_whole_is_quantized_goes_for_the_thinker(omni, tmp_path):
    path, _ = omni
    shutil.copytree(path, tmp_path / "source")
    tensors = load_file(path / "model.safetensors")
    attention = next(name for name in tensors if name.endswith("self_attn.o_proj.weight") and ".model.layers." in name)
    codes, plain = tensors[attention].to(torch.float8_e4m3fn), tensors[attention]
    tensors |= {attention: codes, f"{attention}_scale_inv": torch.tensor(0.5)}
    save_file(tensors, tmp_path / "source" / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": None}
    (tmp_path / "source" / "config.json").write_text(json.dumps(config))
    assert open_checkpoint(tmp_path / "source", quantized=True).layout.format.title == "FP8"
    ours = chat_model(tmp_path / "source", template="qwen3_omni_nothink", kt_backend="torch").engine.model
    found = ours.get_parameter(attention.removeprefix("thinker."))
    assert torch.equal(found, codes.to(found.dtype) * 0.5) and not torch.equal(found.float(), plain)


def answered(chat, question: str, pictures: list) -> list[int]:
    engine = chat.engine
    parts = engine.model, engine.tokenizer, engine.processor, engine.template, engine.generating_args
    messages = [{"role": "user", "content": question}]
    keys, length = engine._process_args(*parts, messages, images=list(pictures), input_kwargs={"max_new_tokens": 8})
    with torch.inference_mode():
        return engine.model.generate(**keys)[0, length:].tolist()
