"""Small random models of seven architectures and random adapters for them, made on the spot.

Sizes differ wherever a mistake could hide: experts, rank, hidden and intermediate size are all different numbers, and
every expert has weights of its own.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

DEMO = Path(__file__).parents[1] / "examples" / "demo"
VOCAB = 1024

# hidden 64 (or 72: not a multiple of the kernel's 32), experts' intermediate 96 (or 40)
_COMMON = {
    "vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "num_experts_per_tok": 3, "max_position_embeddings": 512, "bos_token_id": 0,
    "eos_token_id": 1, "pad_token_id": 1, "initializer_range": 0.15,
}  # fmt: skip
_MLA = {
    "q_lora_rank": None, "kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 16,
    "num_key_value_heads": 4, "n_shared_experts": 1, "n_routed_experts": 6, "n_group": 1, "topk_group": 1,
    "first_k_dense_replace": 1, "moe_intermediate_size": 96,
}  # fmt: skip
ARCHITECTURES: dict[str, dict] = {
    "deepseek_v2": {**_COMMON, **_MLA, "topk_method": "greedy"},
    "deepseek_v3": {**_COMMON, **_MLA},
    "qwen2_moe": {**_COMMON, "num_experts": 6, "moe_intermediate_size": 40, "shared_expert_intermediate_size": 80},
    "qwen3_moe": {**_COMMON, "hidden_size": 72, "head_dim": 16, "num_experts": 6, "moe_intermediate_size": 96},
    "mixtral": {**_COMMON, "num_local_experts": 6, "intermediate_size": 96},
    "glm4_moe": {
        **_COMMON, "n_routed_experts": 6, "n_shared_experts": 1, "n_group": 1, "topk_group": 1, "head_dim": 16,
        "moe_intermediate_size": 96, "first_k_dense_replace": 1,
    },
    "olmoe": {**_COMMON, "num_experts": 6, "intermediate_size": 96},
}  # fmt: skip


def make_model(directory: Path, architecture: str, *, dtype=torch.bfloat16, seed: int = 0, **changes) -> Path:
    """Save a random model with the demo's tokenizer; weights differ from expert to expert."""
    torch.manual_seed(seed)
    save_options = {k: changes.pop(k) for k in ("max_shard_size", "save_original_format") if k in changes}
    config = AutoConfig.for_model(architecture, **{**ARCHITECTURES[architecture], **changes})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() >= 2:
                parameter.normal_(0, 1.0 if ".gate.weight" in name else parameter.shape[-1] ** -0.5)
        for name, buffer in model.named_buffers():
            if "e_score_correction_bias" in name:
                buffer.normal_(0, 0.1)
    model.to(dtype).save_pretrained(directory, **save_options)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(DEMO / "model" / file, directory)
    return directory


def moe_layers(directory: Path) -> dict[int, tuple[str, int, int, int]]:
    """layer -> (experts' module, experts, hidden, intermediate), from a stock model."""
    config = AutoConfig.from_pretrained(directory)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    found = {}
    for name, module in model.named_modules():
        if name.endswith(".experts"):
            experts, hidden, intermediate = module.down_proj.shape
            found[int(name.split(".layers.")[1].split(".")[0])] = (name, experts, hidden, intermediate)
    return found


def other_modules(directory: Path) -> dict[str, tuple[int, int]]:
    """Linear modules that are not routed experts (nor the head): name -> (out, in)."""
    config = AutoConfig.from_pretrained(directory)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return {
        name: (module.out_features, module.in_features)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and "lm_head" not in name and not name.endswith((".gate", "_gate"))
    }


def make_adapter(
    directory: Path,
    model: Path,
    *,
    rank: int = 8,
    alpha: float = 16,
    naming: str = "B",
    skip_layers: tuple[int, ...] = (),
    dtype=torch.bfloat16,
    scale: float = 1.0,
    seed: int = 1,
    **config,
) -> Path:
    """Save a random adapter on every linear module and every expert.

    ``naming``: ``A`` (``mlp.original_moe.experts``), ``B`` (``mlp.experts``) or ``mixtral``
    (``block_sparse_moe.experts`` with ``w1``/``w3``/``w2``).
    """
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    tensors: dict[str, torch.Tensor] = {}

    def add(module: str, out: int, size: int) -> None:
        tensors[f"base_model.model.{module}.lora_A.weight"] = random(rank, size) * size**-0.5
        tensors[f"base_model.model.{module}.lora_B.weight"] = random(out, rank) * scale * 0.3 * rank**-0.5

    for module, (out, size) in other_modules(model).items():
        add(module, out, size)
    names = {"gate": "w1", "up": "w3", "down": "w2"} if naming == "mixtral" else None
    for layer, (module, experts, hidden, intermediate) in moe_layers(model).items():
        if layer in skip_layers:
            continue
        block = module.removesuffix(".experts")
        block = {"A": f"{block}.original_moe", "B": block, "mixtral": block.replace(".mlp", ".block_sparse_moe")}[
            naming
        ]
        for expert in range(experts):
            for projection in ("gate", "up", "down"):
                out, size = (hidden, intermediate) if projection == "down" else (intermediate, hidden)
                add(f"{block}.experts.{expert}.{names[projection] if names else f'{projection}_proj'}", out, size)
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.to(dtype).contiguous() for name, tensor in tensors.items()}
    save_file(tensors, directory / "adapter_model.safetensors", metadata={"format": "pt"})
    targets = sorted({name.split(".lora_")[0].rpartition(".")[2] for name in tensors})
    write_config(directory, model, r=rank, lora_alpha=alpha, target_modules=targets, **config)
    return directory


def write_config(directory: Path, model: Path | str, **config) -> None:
    values = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": str(model), "bias": "none",
              "peft_version": "0.18.1", "inference_mode": True, **config}  # fmt: skip
    (directory / "adapter_config.json").write_text(json.dumps(values))


def edit_adapter(directory: Path, change) -> Path:
    """Rewrite an adapter's tensors: ``change(tensors) -> tensors`` on a plain dictionary."""
    file = directory / "adapter_model.safetensors"
    tensors = change(load_file(file))
    save_file(tensors, file, metadata={"format": "pt"})
    return directory


_PROJECTIONS = {"gate_proj": 0, "w1": 0, "up_proj": 1, "w3": 1, "down_proj": 2, "w2": 2}


@torch.no_grad()
def merged_float32(
    model: Path, adapter: Path | list[Path] | None, *, experts: bool = True, dtype=torch.float32, scaling=None
):
    """Stock transformers in ``dtype`` with the adapter (or several) added to the weights by a plain float32 sum.

    This is the reference: it shares no code with the package. ``scaling(module, rank)`` replaces alpha / rank.
    """
    stock = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    for directory in [adapter] if isinstance(adapter, Path) else adapter or []:
        config = json.loads((directory / "adapter_config.json").read_text())
        tensors = load_file(directory / "adapter_model.safetensors")
        weights = dict(stock.named_parameters())
        for name, a in tensors.items():
            if ".lora_A." not in name:
                continue
            b = tensors[name.replace(".lora_A.", ".lora_B.")]
            module = name.removeprefix("base_model.model.").split(".lora_A")[0]
            rank = a.shape[0]
            factor = scaling(module, rank) if scaling else config["lora_alpha"] / rank
            delta = factor * (b.double() @ a.double()).float()
            if ".experts." in module and "shared" not in module.split(".experts.")[0][-7:]:
                if not experts:
                    continue
                block, _, rest = (
                    module.replace(".original_moe", "").replace("block_sparse_moe", "mlp").partition(".experts.")
                )
                expert, projection = rest.split(".")
                place = _PROJECTIONS[projection]
                if place == 2:
                    weights[f"{block}.experts.down_proj"][int(expert)] += delta
                else:
                    weight = weights[f"{block}.experts.gate_up_proj"][int(expert)]
                    half = weight.shape[0] // 2
                    weight[place * half : (place + 1) * half] += delta
            else:
                weights[f"{module}.weight"] += delta
    return stock.to(dtype).eval()


def delta_of(lora, projection: str, expert: int) -> torch.Tensor:
    """ΔW [out, in] of one expert of an ``ExpertLora``, float64."""
    b = lora.b[projection][expert].double() * lora.scaling[projection][expert]
    return b @ lora.a[projection][expert].double()


def rel(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Relative error in the Euclidean norm."""
    return float((found.float() - wanted.float()).norm() / wanted.float().norm())


def per_token(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Three quarters of the tokens have a smaller relative error than this. The rest may hold the tokens whose router
    decided a tie the other way, in stock bfloat16 as well as here; one wrong expert of six touches half the tokens."""
    errors = (found - wanted).flatten(0, 1).norm(dim=-1) / wanted.flatten(0, 1).norm(dim=-1)
    return float(errors.quantile(0.75))
