"""Adapters drawn from the cross product of what PEFT can be told, made by PEFT itself, and the float32 models that it then computes."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import peft
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from llamafactory_kt.adapters.keys import PEFT_PREFIX

from .adapters import edit_adapter
from .architectures import tiny_model
from .expert_layouts import each_expert, each_projection, fused_projections, renamed
from .foreign_adapters import stock
from .loading import TWO_ROWS, logits
from .models import make_model
from .peft_training import TOKENS

_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
_MLA = ("q_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")
_MLP = ("gate_proj", "up_proj", "down_proj", "shared_experts.up_proj", "layers.0.mlp.down_proj")
_TRAINED = dict.fromkeys(("qwen3_moe", "tied", "mixtral", "gpt_oss"), _ATTENTION) | {"deepseek_v3": (*_MLA, *_MLP)}
"""base -> names of linear modules"""
_ROUTER = dict.fromkeys(_TRAINED, "mlp.gate") | {"gpt_oss": "mlp.router"}
_EXPERTS = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")
_AMBIGUOUS = (r".*\.1\..*_proj", "gate_proj", "up_proj")
"""patterns that match other experts' LoRA in one layout than in another"""
STARTS = [
    True,
    False,
    "gaussian",
    "orthogonal",
    "eva",
    "mica",
    "pissa",
    "pissa_niter_4",
    "olora",
    "corda",
    "lora_ga",
    "loftq",
]
_MOVE_BASE = ("pissa", "olora", "corda", "lora_ga")
"""those that PEFT can convert to plain LoRA"""
LAYOUTS = ["PEFT", "adapter's name in keys", "no prefix", ".bin", "two files"]
EXPERT_LAYOUTS = {"each expert": each_expert, "each projection": each_projection, "fused": fused_projections}


@dataclass(frozen=True)
class Drawn:
    """One point of the cross product."""

    seed: int
    base: str
    keys: dict[str, Any]
    """of LoraConfig"""
    converted: bool
    """saved with ``path_initial_model_for_weight_conversion``"""
    save: bool | str
    """``save_embedding_layers``"""
    dtype: torch.dtype
    layout: str


def make_bases(directory: Path) -> dict[str, Path]:
    """Models of two layers in float32, so that a merged weight is not rounded."""
    changes: dict[str, dict[str, Any]] = {"tied": {"tie_word_embeddings": True, "attention_bias": True}}
    bases = {}
    for name in _TRAINED:
        if name == "gpt_oss":
            tiny_model(name, num_hidden_layers=2).save_pretrained(directory / name)
        else:
            keys = {
                "num_hidden_layers": 2,
                "dtype": torch.float32,
                "tie_word_embeddings": False,
                **changes.get(name, {}),
            }
            make_model(directory / name, "qwen3_moe" if name == "tied" else name, **keys)
        bases[name] = directory / name
    return bases


def drawn(seed: int) -> Drawn:
    """One point of the cross product. It has few features, since of many at once PEFT refuses most."""
    chance = Random(seed)
    base = chance.choice(list(_TRAINED))
    modules, router = _TRAINED[base], _ROUTER[base]
    vocabulary = ("embed_tokens", "lm_head")

    def some(values: Sequence[Any], most: int = 3) -> list[Any]:
        return chance.sample(list(values), chance.randint(1, most))

    targets = chance.choice(
        [
            "all-linear",
            r".*self_attn\.[qo]_proj",
            r".*layers\.1\..*_proj",
            [],
            *(some([*modules, *modules, *vocabulary]) for _ in range(4)),
        ]
    )
    parameters = chance.choice([[], list(_EXPERTS), some([*_EXPERTS, f"{router}.weight", "self_attn.o_proj.weight"])])
    likely = [*parameters, *(targets if isinstance(targets, list) else modules)]
    patterns = [
        *likely, *likely, *modules, *vocabulary, "self_attn.q_proj", "model.layers.1.self_attn.q_proj", "^model.layers.0.self_attn.o_proj", r"layers\.0\..*",
        _AMBIGUOUS[0], *_EXPERTS, *_EXPERTS, "experts.gate_up_proj", "model.layers.1.mlp.experts.down_proj", router, f"{router}.weight",
        "block_sparse_moe.experts.down_proj", "block_sparse_moe.gate", "q_proj|v_proj",
    ]  # fmt: skip

    def pattern() -> dict[str, int]:
        return {key: chance.randint(1, 9) for key in some(patterns)}

    features: dict[str, Callable[[], Any]] = {
        "init_lora_weights": lambda: chance.choice(STARTS),
        "use_rslora": lambda: True,
        "use_dora": lambda: True,
        "rank_pattern": pattern,
        "alpha_pattern": pattern,
        "modules_to_save": lambda: some([*vocabulary, *vocabulary, "norm", "input_layernorm", router, modules[-1], "o_proj", "self_attn", "mlp"]),
        "ensure_weight_tying": lambda: True,
        "trainable_token_indices": lambda: chance.choice(
            [some(TOKENS, 8), dict.fromkeys(some(vocabulary, 2), some(TOKENS, 8)), {name: some(TOKENS, 8) for name in some(vocabulary, 2)}]
        ),
        "bias": lambda: chance.choice(["all", "lora_only"]),
        "lora_bias": lambda: True,
        "exclude_modules": lambda: chance.choice([[modules[1]], r".*layers\.1\..*", ["model.layers.0.self_attn.q_proj"]]),
        "layers_to_transform": lambda: chance.choice([0, 1, [1], [0, 1]]),
    }  # fmt: skip
    keys = {
        "r": 2 * chance.randint(1, 3),
        "lora_alpha": chance.randint(1, 9),
        "target_modules": targets,
        "target_parameters": parameters,
        **{name: features[name]() for name in some(list(features), 4)},
    }
    start = keys.get("init_lora_weights", True)
    if isinstance(start, str):  # what PEFT does not do together
        keys.pop("lora_bias", None)
    if "use_dora" in keys:
        keys.pop("lora_bias", None)
    if keys.keys() & {"use_dora", "lora_bias"} or isinstance(start, str):
        keys["target_parameters"] = []
    if not keys["target_modules"] and not keys["target_parameters"]:
        keys["target_modules"] = list(modules[:1])
    if isinstance(keys["target_modules"], str):
        keys.pop("layers_to_transform", None)
    ambiguous = {*keys.get("rank_pattern", {}), *keys.get("alpha_pattern", {})}.intersection(_AMBIGUOUS)
    renames = set(_EXPERTS).intersection(keys["target_parameters"]) and base != "gpt_oss" and not ambiguous
    return Drawn(
        seed,
        base,
        keys,
        converted=str(start).startswith(_MOVE_BASE) and chance.random() < 0.5,
        save=chance.choice(["auto", "auto", True, False]),
        dtype=chance.choice([torch.float32, torch.float32, torch.float16, torch.bfloat16]),
        layout=chance.choice([*LAYOUTS, *EXPERT_LAYOUTS] if renames else LAYOUTS),
    )


def made(case: Drawn, base: Path, directory: Path) -> tuple[Path, torch.Tensor]:
    """Let PEFT make the adapter and save it; returns the directory and the trained model's logits.

    Raises:
        Exception: PEFT's own, for what it does not do.
    """
    torch.manual_seed(case.seed)
    start = case.keys.get("init_lora_weights", True)
    keys = deepcopy(case.keys)
    if start == "loftq":  # which PEFT computes on a GPU alone
        keys["init_lora_weights"] = True
    config = LoraConfig(task_type="CAUSAL_LM", **keys)
    model = _started(stock(base), config)
    if case.converted:
        config.init_lora_weights = True
        model.save_pretrained(directory / "start")
    config.init_lora_weights = start
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    conversion = {"path_initial_model_for_weight_conversion": directory / "start"} if case.converted else {}
    adapter = directory / "adapter"
    model.save_pretrained(adapter, save_embedding_layers=case.save, **conversion)
    edit_adapter(adapter, lambda tensors: {name: tensor.to(case.dtype) for name, tensor in tensors.items()})
    return adapter, logits(model.eval())


def _started(model: Any, config: LoraConfig) -> Any:
    """The model at the start of training, which some starts compute from data."""

    def run() -> Any:
        return model(input_ids=TWO_ROWS, labels=TWO_ROWS)

    if config.init_lora_weights == "eva":
        config.eva_config = peft.EvaConfig(rho=2.0)
        started = get_peft_model(model, config)
        rows = [{"input_ids": TWO_ROWS, "attention_mask": torch.ones_like(TWO_ROWS)}] * 4
        peft.initialize_lora_eva_weights(started, rows, show_progress_bar=False)
        return started
    if config.init_lora_weights == "corda":
        from peft.tuners.lora.config import CordaConfig
        from peft.tuners.lora.corda import preprocess_corda  # needs attrs, which PEFT does not install

        config.corda_config = CordaConfig()
        preprocess_corda(model, config, run_model=torch.no_grad()(run))
    if config.init_lora_weights == "lora_ga":
        config.lora_ga_config = peft.LoraGAConfig()
        peft.preprocess_loraga(model, config, lambda: run().loss.backward())
    return get_peft_model(model, config)


def answer_of_peft(adapter: Path, base: Path) -> tuple[torch.Tensor, bool]:
    """The logits that PEFT computes after loading an adapter, and whether it can merge it, with the same answer.

    Raises:
        Exception: PEFT's own.
    """
    model = PeftModel.from_pretrained(stock(base), adapter).eval()
    answer = logits(model)
    try:
        merged = logits(model.merge_and_unload())
    except Exception:
        return answer, False
    return answer, torch.allclose(merged, answer, atol=1e-3)


def relaid(case: Drawn, adapter: Path, base: Path) -> Path:
    """The adapter in the drawn layout."""
    file = adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    if case.layout == "adapter's name in keys":
        tensors = {
            re.sub(r"(\.lora_(?:A|B|embedding_A|embedding_B|magnitude_vector))", r"\1.default", name): t
            for name, t in tensors.items()
        }
    elif case.layout == "no prefix":
        tensors = {name.removeprefix(PEFT_PREFIX): tensor for name, tensor in tensors.items()}
    elif case.layout in EXPERT_LAYOUTS:
        config = stock(base).config
        experts = getattr(config, "num_local_experts", None) or config.num_experts
        tensors = renamed(tensors, EXPERT_LAYOUTS[case.layout], experts, config.hidden_size)
        raw = json.loads((adapter / "adapter_config.json").read_text())
        patterns = {
            name: {new: value for old, value in raw[name].items() for new in _patterns(old, case.layout)}
            for name in ("rank_pattern", "alpha_pattern")
        }
        others = [name for name in raw["target_parameters"] if name.endswith(".weight")]
        (adapter / "adapter_config.json").write_text(json.dumps(raw | patterns | {"target_parameters": others or None}))
    file.unlink()
    if case.layout == ".bin":
        torch.save(tensors, adapter / "adapter_model.bin")
    elif case.layout == "two files":
        parts = {f"adapter_model-{number}.safetensors": dict(list(tensors.items())[number::2]) for number in (0, 1)}
        for name, part in parts.items():
            save_file(part, adapter / name)
        index = {"weight_map": {tensor: name for name, part in parts.items() for tensor in part}}
        (adapter / f"{file.name}.index.json").write_text(json.dumps(index))
    else:
        save_file(tensors, file)
    return adapter


def _patterns(key: str, layout: str) -> list[str]:
    """A pattern for an expert's LoRA by the names of a layout; PEFT itself adds ``.*\\.gate_up_proj``."""
    before, found, weight = key.rpartition("experts.")
    if not found and key.endswith("gate_up_proj"):
        before, found, weight = key.removesuffix("gate_up_proj"), "experts.", "gate_up_proj"
    if not found or layout == "fused" or "shared" in before:
        return [key]
    number = r"\d+\." if layout == "each expert" else ""
    return [
        f"{before}experts.{number}{name}"
        for name in (["gate_proj", "up_proj"] if weight == "gate_up_proj" else [weight])
    ]
