"""Train the demo model and its adapter from scratch, on a CPU, in a few minutes.

    python examples/demo/train.py [--output DIR]

Writes two directories. ``model/`` has the DeepSeek-V2 architecture: one dense layer and three MoE layers with eight routed
experts (two per token) and one shared expert. ``adapter/`` has LoRA on attention, dense MLP, shared and routed experts, with one
tensor pair per expert, as PEFT wrote them for transformers 4. ``conversations.json`` has the prompts and both sets of answers.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path

import torch
from llamafactory.data import get_template_and_fix_tokenizer
from llamafactory.hparams import DataArguments
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from torch.nn.utils import parametrize
from transformers import DeepseekV2Config, DeepseekV2ForCausalLM, PreTrainedTokenizerFast

HERE = Path(__file__).parent
BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
RANK, ALPHA = 8, 16
IGNORE = -100


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=1024, special_tokens=[BOS, EOS], initial_alphabet=alphabet)
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, pad_token=EOS, model_max_length=1024
    )


def build_model(vocab_size: int) -> DeepseekV2ForCausalLM:
    config = DeepseekV2Config(
        vocab_size=vocab_size, hidden_size=128, intermediate_size=256, moe_intermediate_size=96,
        num_hidden_layers=4, first_k_dense_replace=1, n_routed_experts=8, num_experts_per_tok=2,
        n_shared_experts=1, num_attention_heads=4, num_key_value_heads=4, q_lora_rank=None, kv_lora_rank=64,
        qk_nope_head_dim=32, qk_rope_head_dim=16, v_head_dim=32, max_position_embeddings=1024,
        topk_method="greedy", n_group=1, topk_group=1, routed_scaling_factor=1.0, norm_topk_prob=False,
        bos_token_id=0, eos_token_id=1, pad_token_id=1, dtype="float32",
    )  # fmt: skip
    return DeepseekV2ForCausalLM(config)


class ExpertDelta(nn.Module):
    """Adds ``ALPHA / RANK * B[e] @ A[e]`` to a stacked weight [E, out, in]; ``parts`` LoRAs share the out axis."""

    def __init__(self, weight: torch.Tensor, parts: int):
        super().__init__()
        experts, out_features, in_features = weight.shape
        self.lora_A = nn.Parameter(torch.randn(parts, experts, RANK, in_features) * in_features**-0.5)
        self.lora_B = nn.Parameter(torch.zeros(parts, experts, out_features // parts, RANK))

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        delta = torch.einsum("peor,peri->peoi", self.lora_B, self.lora_A)
        return weight + ALPHA / RANK * torch.cat(tuple(delta), dim=1)


def batch(template, tokenizer, conversations, answer: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Each conversation once, a random third of them as the second turn of a dialogue."""
    rows = []
    for item in conversations:
        turns = [random.choice(conversations), item] if random.random() < 1 / 3 else [item]
        messages = []
        for turn in turns:
            messages += [{"role": "user", "content": turn["prompt"]}, {"role": "assistant", "content": turn[answer]}]
        ids, labels = [], []
        for prompt_ids, answer_ids in template.encode_multiturn(tokenizer, messages):
            ids += prompt_ids + answer_ids
            labels += [IGNORE] * len(prompt_ids) + answer_ids
        rows.append((ids, labels))
    length = max(len(ids) for ids, _ in rows)
    inputs = torch.full((len(rows), length), tokenizer.eos_token_id)
    targets = torch.full((len(rows), length), IGNORE)
    for row, (ids, labels) in enumerate(rows):
        inputs[row, : len(ids)], targets[row, : len(ids)] = torch.tensor(ids), torch.tensor(labels)
    return inputs, targets


def fit(model: nn.Module, next_batch, groups: list[dict], steps: int, name: str) -> None:
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=[group["lr"] for group in groups], total_steps=steps, pct_start=0.1
    )
    for step in range(steps):
        inputs, targets = next_batch()
        loss = model(input_ids=inputs, labels=targets).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for group in groups for p in group["params"]], 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 50 == 0 or step == steps - 1:
            print(f"{name} step {step + 1}/{steps} loss {loss.item():.4f}", flush=True)


def expert_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    """The experts' LoRA as one tensor pair per expert and projection."""
    tensors = {}
    for name, module in model.named_modules():
        if not isinstance(module, ExpertDelta):
            continue
        prefix, _, weight = name.partition(".experts.parametrizations.")
        projections = ["gate_proj", "up_proj"] if weight.startswith("gate_up_proj") else ["down_proj"]
        for part, projection in enumerate(projections):
            for expert in range(module.lora_A.shape[1]):
                key = f"base_model.model.{prefix}.experts.{expert}.{projection}"
                tensors[f"{key}.lora_A.weight"] = module.lora_A[part, expert].detach()
                tensors[f"{key}.lora_B.weight"] = module.lora_B[part, expert].detach()
    return tensors


def train_base(conversations, tokenizer, template, steps: int) -> DeepseekV2ForCausalLM:
    model = build_model(len(tokenizer))
    groups = [{"params": list(model.parameters()), "lr": 3e-3}]
    fit(model, lambda: batch(template, tokenizer, conversations, "base"), groups, steps, "base")
    return model.to(torch.bfloat16)


def train_adapter(model, conversations, tokenizer, template, steps: int):
    targets = ["q_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=targets, task_type="CAUSAL_LM")
    peft_model = get_peft_model(model, config)
    for layer in model.model.layers[model.config.first_k_dense_replace :]:
        experts = layer.mlp.experts
        parametrize.register_parametrization(experts, "gate_up_proj", ExpertDelta(experts.gate_up_proj, parts=2))
        parametrize.register_parametrization(experts, "down_proj", ExpertDelta(experts.down_proj, parts=1))
    experts_params = [p for n, p in model.named_parameters() if ".parametrizations." in n and "lora_" in n]
    others = [p for n, p in peft_model.named_parameters() if "lora_" in n and ".parametrizations." not in n]
    # The experts get the higher learning rate, so that answers clearly differ without their LoRA.
    groups = [{"params": experts_params, "lr": 4e-3}, {"params": others, "lr": 4e-4}]
    fit(peft_model, lambda: batch(template, tokenizer, conversations, "adapter"), groups, steps, "adapter")
    rest = {k: v for k, v in get_peft_model_state_dict(peft_model).items() if ".parametrizations." not in k}
    tensors = {**rest, **expert_tensors(model)}
    return config, {name: tensor.to(torch.bfloat16).contiguous() for name, tensor in tensors.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=HERE)
    parser.add_argument("--steps", type=int, default=300)
    args = parser.parse_args()
    random.seed(0)
    torch.manual_seed(0)

    conversations = json.loads((HERE / "conversations.json").read_text(encoding="utf-8"))
    texts = [text for item in conversations for text in item.values()]
    tokenizer = train_tokenizer([*texts, "Say: ", "User: ", "\n\nAssistant:"])
    template = get_template_and_fix_tokenizer(tokenizer, DataArguments(template="deepseek"))

    # LoRA cannot teach the frozen output layer new words, so the base model learns to repeat those of the adapter's answers.
    repeating = [{"prompt": f"Say: {item['adapter']}", "base": item["adapter"]} for item in conversations]
    model = train_base(conversations + repeating, tokenizer, template, args.steps)
    model.config.dtype = torch.bfloat16
    model.save_pretrained(args.output / "model")
    tokenizer.save_pretrained(args.output / "model")

    config, tensors = train_adapter(model.to(torch.float32), conversations, tokenizer, template, args.steps)
    config.base_model_name_or_path = "examples/demo/model"
    config.inference_mode = True
    config.save_pretrained(args.output / "adapter")
    save_file(tensors, args.output / "adapter" / "adapter_model.safetensors", metadata={"format": "pt"})


if __name__ == "__main__":
    main()
