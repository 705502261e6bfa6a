"""Latent attention whose cache keeps latents, against stock transformers in float32."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from helpers.adapters import make_adapter
from helpers.architectures import tiny_model
from helpers.loading import load
from helpers.marks import needs_native
from helpers.references import merged_float32, rel
from torch import nn
from transformers import AutoModelForCausalLM, StaticCache
from transformers.cache_utils import DynamicCache

from llamafactory_kt import apply_adapter, optimize_for_inference
from llamafactory_kt.decoding import attention, latent_attention
from llamafactory_kt.decoding.latent_attention import LatentAttention
from llamafactory_kt.decoding.latent_contract import read_contract

pytestmark = needs_native
SIZES = {"hidden_size": 80, "kv_lora_rank": 40, "qk_nope_head_dim": 20, "qk_rope_head_dim": 8, "v_head_dim": 28, "num_attention_heads": 5, "num_key_value_heads": 5}  # fmt: skip
"""no two of them equal; 5 heads' keys and values are 5 * (28 + 28) numbers, a latent and the rotated part 48"""
YARN = {
    "rope_type": "yarn", "rope_theta": 1e4, "factor": 8.0, "mscale": 0.7, "mscale_all_dim": 0.7, "beta_fast": 32, "beta_slow": 1,
    "original_max_position_embeddings": 64,
}  # fmt: skip
KINDS = {
    "deepseek_v2": {"q_lora_rank": None},
    "deepseek_v3": {"rope_parameters": YARN},
    "glm4_moe_lite": {},
}
IDS = torch.randint(2, 1000, (3, 60), generator=torch.Generator().manual_seed(0))


def made(directory: Path, architecture: str) -> Path:
    torch.manual_seed(3)
    tiny_model(architecture, **SIZES, **KINDS[architecture]).save_pretrained(directory)
    return directory


def optimized(path: Path, dtype: torch.dtype = torch.float32) -> nn.Module:
    model = load(path, "native", dtype=dtype)
    optimize_for_inference(model)
    return model


def latent_modules(model: nn.Module) -> list[LatentAttention]:
    return [module for module in model.modules() if isinstance(module, LatentAttention)]


def crop(cache: DynamicCache, left: int) -> None:
    try:
        cache.crop(left)
    except ValueError:  # later versions take what goes
        cache.crop(left - cache.get_seq_length())


@torch.inference_mode()
def conversation(model: nn.Module, cache: DynamicCache | None = None, padded: int = 9, batch: int = 3) -> torch.Tensor:
    """Logits [steps, ...] of prompts, one of them shorter; tokens; several at once; beams that change places; and after a cut."""
    cache = DynamicCache() if cache is None else cache
    mask, found, at = torch.ones(batch, 0, dtype=torch.long), [], 0
    for count in (21, 1, 1, 4, 1, 12, 1, "reorder", 1, 1, "crop", 1, 5, 1):
        if count == "reorder":
            order = torch.arange(batch).flip(0)
            cache.reorder_cache(order)
            mask = mask[order]
        elif count == "crop":
            crop(cache, cache.get_seq_length() - 6)
            mask = mask[:, :-6]
        else:
            mask = torch.cat((mask, torch.ones(batch, count, dtype=torch.long)), 1)
            if padded and at == 0:
                mask[1, :padded] = 0
            ids = IDS[:batch, at : at + count]
            positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -count:]
            out = model(input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache)
            found.append(out.logits[:, -1].float())
            at += count
    return torch.stack(found)


def numbers(cache: DynamicCache) -> int:
    """Numbers of a layer's cache for a token."""
    return sum(part.shape[1] * part.shape[3] for part in (cache.layers[1].keys, cache.layers[1].values))


@pytest.mark.parametrize("architecture", KINDS)
def test_against_stock_in_float32(tmp_path, architecture):
    """With LoRA on every projection and without, sums in another order; and the cache has latents alone."""
    path = made(tmp_path / "model", architecture)
    model = optimized(path)
    assert len(latent_modules(model)) == model.config.num_hidden_layers
    adapter = make_adapter(tmp_path / "adapter", path, dtype=torch.float32, scale=2.0)
    effect = []
    for own in (None, adapter):
        if own is not None:
            apply_adapter(model, own)
        stock, cache = merged_float32(path, own), DynamicCache()
        wanted = conversation(stock)
        effect.append(wanted)
        assert rel(conversation(model, cache), wanted) < 2e-5
        assert numbers(cache) == 40 + 8
        assert rel(conversation(model, padded=0, batch=1), conversation(stock, padded=0, batch=1)) < 2e-5
    assert rel(*effect) > 0.05, "the adapter does something"


@pytest.mark.parametrize("architecture", KINDS)
def test_bfloat16_is_as_near_to_float32_as_stock_is(tmp_path, architecture):
    path = made(tmp_path, architecture)
    wanted = conversation(AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32))

    def errors(model: nn.Module) -> torch.Tensor:
        return (conversation(model) - wanted).norm(dim=-1) / wanted.norm(dim=-1)

    stock = errors(AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16))
    assert errors(optimized(path, torch.bfloat16)).median() < 1.25 * stock.median()


@pytest.mark.parametrize("architecture", KINDS)
def test_generation(tmp_path, architecture):
    """Prompts of different lengths, padded on the left; beams; tokens that were guessed."""
    path = made(tmp_path, architecture)
    stock, model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32), optimized(path)
    mask = torch.ones_like(IDS[:, :20])
    mask[0, :11] = 0
    ways = (
        {"num_beams": 1}, {"num_beams": 3}, {"prompt_lookup_num_tokens": 4, "batch": 1}, {"num_beams": 2, "num_return_sequences": 2},
    )  # fmt: skip
    for way in ways:
        batch = way.pop("batch", 3)
        keys = {"attention_mask": mask[-batch:], "max_new_tokens": 12, "do_sample": False, "pad_token_id": 1, **way}
        both = [m.generate(IDS[-batch:, :20], **keys) for m in (stock, model)]
        assert torch.equal(*both), way


def test_both_ways_are_used(tmp_path, monkeypatch):
    """Prompts make keys and values, some heads at a time; tokens attend to latents."""
    model, stock = (
        optimized(made(tmp_path, "deepseek_v3")),
        AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32),
    )
    heads, attend = [], attention.attend
    monkeypatch.setattr(latent_attention, "_BYTES", 3 * 3 * 21 * 4 * (2 * 48 + 8))
    monkeypatch.setattr(
        attention, "attend", lambda q, k, *more: heads.append((q.shape[1], k.shape[1])) or attend(q, k, *more)
    )
    assert rel(conversation(model), conversation(stock)) < 2e-5
    layers = model.config.num_hidden_layers
    assert heads[: 2 * layers] == [(3, 3), (2, 2)] * layers, "the prompt"
    assert (5, 1) in heads


def test_others_get_what_they_had(tmp_path):
    """A cache of another kind; one that has keys and values already; a module at whose calls somebody looks; another attention."""
    path = made(tmp_path, "deepseek_v3")
    stock, model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32), optimized(path)
    wanted = conversation(stock, padded=0)
    with torch.inference_mode():
        static = [
            m(input_ids=IDS, past_key_values=StaticCache(config=m.config, max_cache_len=80)).logits
            for m in (stock, model)
        ]
        assert rel(static[1], static[0]) < 2e-5
        begun = DynamicCache()
        stock(input_ids=IDS[:, :30], past_key_values=begun)
        size = numbers(begun)
        more = model(input_ids=IDS[:, 30:], past_key_values=begun).logits
        assert rel(more, stock(input_ids=IDS).logits[:, 30:]) < 2e-5 and numbers(begun) == size
    seen: list[int] = []
    watch = [m.kv_b_proj.register_forward_hook(lambda *_: seen.append(1)) for m in latent_modules(model)]
    assert rel(conversation(model, padded=0), wanted) < 2e-5 and seen
    for handle in watch:
        handle.remove()
    cache = DynamicCache()
    model.set_attn_implementation("eager")
    assert rel(conversation(model, cache, padded=0), wanted) < 2e-5
    assert numbers(cache) == 48


@pytest.mark.parametrize("change", ["scaling", "rotation", "argument", "part"])
def test_what_computes_something_else_is_left(tmp_path, change):
    module = latent_free(tmp_path)
    assert read_contract(module, {}) is not None
    kind = type(module)

    class Other(kind):
        def forward(self, hidden_states, position_embeddings, attention_mask=None, past_key_values=None, **kwargs):
            if change == "scaling":
                hidden_states = hidden_states * 1.01
            if change == "rotation":
                position_embeddings = position_embeddings[::-1]
            name = "past_key_values" if "past_key_values" in kind.forward.__code__.co_varnames else "cache"
            return super().forward(
                hidden_states=hidden_states, position_embeddings=position_embeddings, attention_mask=attention_mask,
                **{name: past_key_values}, **kwargs,
            )  # fmt: skip

    if change == "argument":

        def forward(
            self, hidden_states, position_embeddings, attention_mask, position_ids, past_key_values=None, **kwargs
        ):
            raise AssertionError

        Other.forward = forward
    if change == "part":
        module.indexer = nn.Linear(3, 3)
    else:
        module.__class__ = Other
    assert read_contract(module, {}) is None


def latent_free(directory: Path) -> nn.Module:
    model = AutoModelForCausalLM.from_pretrained(made(directory, "deepseek_v3"), dtype=torch.float32)
    return model.model.layers[1].self_attn
