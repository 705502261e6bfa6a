"""Small random image-text models with a processor of their own, made on the spot; pictures and films; and their prompts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedTokenizerFast, ProcessorMixin

from .places import DEMO

_SPECIAL = {
    "qwen": ["<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"],
    "glm": [
        "[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>", "<|begin_of_image|>", "<|end_of_image|>",
        "<|begin_of_video|>", "<|end_of_video|>", "<|image|>", "<|video|>", "</answer>",
    ],
    "gemma": ["<|turn>", "<turn|>", "<|think|>", "<|image>", "<image|>", "<|image|>", "<|video|>", "<|audio>", "<audio|>", "<|audio|>"],
}  # fmt: skip
_VOCAB = 1024 + 24  # the demo's and those
_TEXT = {
    "vocab_size": _VOCAB, "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 3, "num_attention_heads": 2,
    "num_key_value_heads": 1, "num_experts_per_tok": 3, "moe_intermediate_size": 96, "max_position_embeddings": 2048,
    "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 1,
}  # fmt: skip
_VISION = {
    "depth": 2, "hidden_size": 48, "intermediate_size": 80, "num_heads": 2, "out_hidden_size": 64, "patch_size": 8,
    "spatial_merge_size": 2, "temporal_patch_size": 2,
}  # fmt: skip


def _rope(**more: Any) -> dict[str, Any]:
    return {"rope_type": "default", "mrope_section": [4, 2, 2], "rope_theta": 10000.0, **more}


class ImageText(NamedTuple):
    """One architecture."""

    template: str
    """LLaMA-Factory's name"""
    family: str
    text: dict[str, Any]
    vision: dict[str, Any]

    def text_config(self, **changes: Any) -> dict[str, Any]:
        return _TEXT | self.text | changes

    def vision_config(self) -> dict[str, Any]:
        return _VISION | self.vision


ARCHITECTURES = {
    "qwen3_vl_moe": ImageText(
        "qwen3_vl_nothink", "qwen",
        {"num_experts": 6, "head_dim": 16, "rope_parameters": _rope(mrope_interleaved=True)},
        {"num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1]},
    ),
    "qwen3_5_moe": ImageText(
        "qwen3_5_nothink", "qwen",
        {
            "num_experts": 6, "head_dim": 32, "shared_expert_intermediate_size": 80, "num_hidden_layers": 4,
            "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 16,
            "rope_parameters": _rope(mrope_interleaved=True, partial_rotary_factor=0.5),
        },
        {"num_position_embeddings": 64},
    ),
    "glm4v_moe": ImageText(
        "glm4_5v", "glm",
        {
            "n_routed_experts": 6, "n_shared_experts": 1, "first_k_dense_replace": 1,
            "rope_parameters": _rope(partial_rotary_factor=0.5),
        },
        {"image_size": 64, "intermediate_size": 80},
    ),
    "gemma4": ImageText(
        "gemma4", "gemma",
        {
            "enable_moe_block": True, "num_experts": 6, "top_k_experts": 3, "hidden_size_per_layer_input": 0, "head_dim": 16,
            "global_head_dim": 32, "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
        },
        {
            "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 24, "patch_size": 4,
            "position_embedding_size": 128,
        },
    ),
}  # fmt: skip


def make_image_text_model(directory: Path, architecture: str, *, dtype=torch.bfloat16, seed: int = 0, **text) -> Path:
    """Save a random model, the demo's tokenizer with the special tokens of its template, and its processor."""
    made = ARCHITECTURES[architecture]
    processor = _processor(made.family)
    special = {
        f"{name}_token_id": processor.tokenizer.convert_tokens_to_ids(token)
        for name, token in {
            "qwen": {"image": "<|image_pad|>", "video": "<|video_pad|>", "vision_start": "<|vision_start|>",
                     "vision_end": "<|vision_end|>"},
            "glm": {"image": "<|image|>", "video": "<|video|>", "image_start": "<|begin_of_image|>",
                    "image_end": "<|end_of_image|>", "video_start": "<|begin_of_video|>", "video_end": "<|end_of_video|>"},
            "gemma": {"image": "<|image|>", "video": "<|video|>", "boi": "<|image>", "eoi": "<image|>"},
        }[made.family].items()
    }  # fmt: skip
    config = AutoConfig.for_model(
        architecture, text_config=made.text_config(**text), vision_config=made.vision_config(), **special
    )
    torch.manual_seed(seed)
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() >= 2:
                fan_in = parameter[0].numel() if parameter.dim() > 3 else parameter.shape[-1]
                parameter.normal_(0, 1.0 if ".gate.weight" in name else fan_in**-0.5)
        for name, buffer in model.named_buffers():
            if "e_score_correction_bias" in name:
                buffer.normal_(0, 0.1)
    model.to(dtype).save_pretrained(directory)
    processor.save_pretrained(directory)
    return directory


def make_tokenizer(special: list[str], named: dict[str, str] | None = None) -> PreTrainedTokenizerFast:
    """The demo's tokenizer with more special tokens, and names for some of them that processors look for."""
    settings = json.loads((DEMO / "model" / "tokenizer_config.json").read_text())
    names = {name: settings[name] for name in ("bos_token", "eos_token", "pad_token")}
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(DEMO / "model" / "tokenizer.json"), **names)
    tokenizer.add_special_tokens({"additional_special_tokens": special})
    if named is None:
        return tokenizer
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer._tokenizer, extra_special_tokens=named, **names)


def _processor(family: str) -> ProcessorMixin:
    import transformers

    if family == "gemma":
        named = {
            "image_token": "<|image|>", "boi_token": "<|image>", "eoi_token": "<image|>",
            "audio_token": "<|audio|>", "boa_token": "<|audio>", "eoa_token": "<audio|>",
        }  # fmt: skip
        sizes = {"patch_size": 4, "max_soft_tokens": 70}
        return transformers.Gemma4Processor(
            transformers.Gemma4AudioFeatureExtractor(), transformers.Gemma4ImageProcessor(**sizes),
            make_tokenizer(_SPECIAL[family], named), transformers.Gemma4VideoProcessor(**sizes),
        )  # fmt: skip
    tokenizer = make_tokenizer(_SPECIAL[family])
    sizes = {"patch_size": 8, "merge_size": 2, "temporal_patch_size": 2}
    pixels = {"size": {"shortest_edge": 32 * 32, "longest_edge": 512 * 512}}
    image, video, processor = {
        "qwen": ("Qwen2VLImageProcessor", "Qwen3VLVideoProcessor", "Qwen3VLProcessor"),
        "glm": ("Glm4vImageProcessor", "Glm4vVideoProcessor", "Glm4vProcessor"),
    }[family]
    return getattr(transformers, processor)(
        getattr(transformers, image)(**sizes, **pixels), tokenizer, getattr(transformers, video)(**sizes, **pixels)
    )


def picture(width: int = 96, height: int = 64, seed: int = 0) -> Image.Image:
    """Coarse random blocks: what a small model can tell apart after scaling, too."""
    blocks = np.random.default_rng(seed).integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)
    return Image.fromarray(blocks.repeat(8, 0).repeat(8, 1))


_PLACES = {
    "qwen": ("<|vision_start|><|image_pad|><|vision_end|>", "<|vision_start|><|video_pad|><|vision_end|>"),
    "glm": ("<|begin_of_image|><|image|><|end_of_image|>", "<|begin_of_video|><|video|><|end_of_video|>"),
    "gemma": ("<|image|>", "<|video|>"),
}


def prompt(architecture: str, *turns: str) -> str:
    """What the template makes of user and assistant turns, with ``<image>`` and ``<video>`` where the processor expects them."""
    family, pairs = ARCHITECTURES[architecture].family, [*zip(turns[::2], [*turns[1::2], None], strict=True)]
    if family == "qwen":
        text = "".join(
            f"<|im_start|>user\n{asked}<|im_end|>\n<|im_start|>assistant\n" + (f"{said}<|im_end|>\n" if said else "")
            for asked, said in pairs
        )
    elif family == "glm":
        text = "[gMASK]<sop>" + "".join(
            f"<|user|>\n{asked}<|assistant|>" + (f"\n{said}" if said else "") for asked, said in pairs
        )
    else:
        text = "<｜begin▁of▁sentence｜><|turn>system\n<|think|>You are a helpful assistant.<turn|>\n" + "".join(
            f"<|turn>user\n{asked}<turn|>\n<|turn>model\n" + (f"{said}<turn|>\n" if said else "")
            for asked, said in pairs
        )
    image, video = _PLACES[family]
    return text.replace("<image>", image).replace("<video>", video)
