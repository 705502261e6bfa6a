"""Random models with published layer sizes and a random adapter, for benches without a download.

Tensor names are those of a published checkpoint: transformers' own conversions, backwards. Each layer has a file. The
values are normally distributed, with a variance that keeps activations in range, so routers spread their tokens.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from ...ground.atomic_output import replacing, writing
from ...ground.errors import KTModelError
from ...ground.machine import cache_directory, gib
from ...ground.tensors.writer import write_safetensors
from .memory import CheckpointBytes
from .shapes import ModelShape

RANK, ALPHA = 8, 16
_LAYER = re.compile(r"\.layers\.(\d+)\.")
_POOL = 2**24
"""random values that all tensors are cut from, each at another offset"""


@dataclass(frozen=True)
class SyntheticModel:
    """A model and an adapter in one directory, written or to be written."""

    directory: Path
    config: Any
    """transformers' configuration"""
    tensors: dict[str, tuple[int, ...]]
    """the checkpoint's tensors, with their shapes"""
    lora: dict[str, tuple[int, ...]]
    """the adapter's tensors, with their shapes"""

    @classmethod
    def of(cls, shape: ModelShape) -> SyntheticModel:
        """Compute names and shapes on a model without weights; nothing is written."""
        from transformers import AutoConfig, AutoModelForCausalLM
        from transformers.core_model_loading import revert_weight_conversion

        config = AutoConfig.for_model(
            shape.model_type, **shape.values, bos_token_id=0, eos_token_id=1, pad_token_id=1, dtype="bfloat16"
        )
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        config.architectures = [type(model).__name__]
        tensors = {n: tuple(t.shape) for n, t in revert_weight_conversion(model, model.state_dict()).items()}
        linear = {n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and not n.endswith(".gate")}
        lora: dict[str, tuple[int, ...]] = {}
        for name, size in tensors.items():
            module = name.removesuffix(".weight")
            if (module in linear and module != "lm_head") or ".experts." in name:
                lora[f"base_model.model.{module}.lora_A.weight"] = (RANK, size[1])
                lora[f"base_model.model.{module}.lora_B.weight"] = (size[0], RANK)
        return cls(cache_directory() / "synthetic" / shape.name, config, tensors, lora)

    @property
    def model(self) -> Path:
        return self.directory / "model"

    @property
    def adapter(self) -> Path:
        return self.directory / "adapter"

    @property
    def values(self) -> dict[str, Any]:
        """LLaMA-Factory's keys for a chat."""
        return {
            "model_name_or_path": str(self.model), "adapter_name_or_path": str(self.adapter), "template": "empty",
            "infer_backend": "huggingface", "use_kt": True,
        }  # fmt: skip

    @property
    def weights(self) -> CheckpointBytes:
        """The checkpoint's bytes."""
        return CheckpointBytes.of({name: 2 * prod(size) for name, size in self.tensors.items()})

    def build(self) -> Path:
        """Write the model and the adapter, unless they are there already.

        Returns:
            A YAML for ``llamafactory-cli chat``.

        Raises:
            KTModelError: The disk is too small.
        """
        import yaml

        parts = (self.model, self.tensors, self._write_model), (self.adapter, self.lora, self._write_adapter)
        missing = [part for part in parts if not part[0].is_dir()]
        with writing(self.directory):
            self.directory.mkdir(parents=True, exist_ok=True)
        total = sum(2 * prod(size) for _, tensors, _ in missing for size in tensors.values())
        if total > (free := shutil.disk_usage(self.directory).free):
            raise KTModelError(
                f"{self.directory}: the synthetic model takes {gib(total)}, and {gib(free)} are free on this disk. Free some, "
                "put the cache elsewhere with XDG_CACHE_HOME, or take fewer layers (--synthetic NAME:LAYERS)."
            )
        with tqdm(
            total=total, unit="B", unit_scale=True, unit_divisor=1024, desc="Writing", disable=None if total else True
        ) as bar:
            for path, tensors, write in missing:
                with replacing(path) as temporary:
                    temporary.mkdir()
                    write(temporary, _RandomTensors(tensors, bar))
        chat = self.directory / "chat.yaml"
        with replacing(chat) as temporary:
            temporary.write_text(yaml.safe_dump(self.values, sort_keys=False), encoding="utf-8")
        return chat

    def _write_model(self, directory: Path, random: _RandomTensors) -> None:
        files: dict[str, list[str]] = {}
        for name in self.tensors:
            layer = _LAYER.search(name)
            file = f"layer-{int(layer[1]):03}" if layer else "others"
            files.setdefault(f"{file}.safetensors", []).append(name)
        for file, names in files.items():
            write_safetensors(directory / file, names, random.make(names), {"format": "pt"})
        weight_map = {name: file for file, names in files.items() for name in names}
        index = {"metadata": {"total_size": self.weights.total}, "weight_map": weight_map}
        (directory / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
        self.config.save_pretrained(directory)
        _byte_tokenizer().save_pretrained(directory)

    def _write_adapter(self, directory: Path, random: _RandomTensors) -> None:
        write_safetensors(directory / "adapter_model.safetensors", self.lora, random.make(self.lora), {"format": "pt"})
        targets = sorted({name.partition(".lora_")[0].rpartition(".")[2] for name in self.lora})
        config = {
            "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": str(self.model), "bias": "none",
            "inference_mode": True, "r": RANK, "lora_alpha": ALPHA, "target_modules": targets,
        }  # fmt: skip
        (directory / "adapter_config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")


class _RandomTensors:
    """Tensors of random values, the same in each run; a progress bar counts their bytes."""

    def __init__(self, sizes: Mapping[str, tuple[int, ...]], bar: Any) -> None:
        generator = torch.Generator().manual_seed(0)
        self._pool = torch.randn(_POOL, generator=generator).to(torch.bfloat16).repeat(2)
        self._scaled: dict[float, torch.Tensor] = {}  # few scales, so most tensors are views
        self._start = 0
        self._sizes, self._bar = sizes, bar

    def make(self, names: Iterable[str]) -> Iterator[tuple[str, torch.Tensor]]:
        """(name, bfloat16 tensor) for each name."""
        for name in names:
            tensor = self._tensor(name, self._sizes[name])
            yield name, tensor
            self._bar.update(tensor.nbytes)

    def _tensor(self, name: str, size: tuple[int, ...]) -> torch.Tensor:
        """Norms are ones; biases and LoRA's B are small. Embeddings have variance 1, so that routers see mostly the token's own
        embedding. Other weights keep the variance of their input."""
        if name.endswith("norm.weight"):
            return torch.ones(size, dtype=torch.bfloat16)
        scale = 0.1 if len(size) == 1 or ".lora_B." in name else size[-1] ** -0.5
        if name.endswith("embed_tokens.weight"):
            scale = 1.0
        self._start = (self._start + 506_371) % _POOL
        if scale not in self._scaled:
            self._scaled[scale] = self._pool * scale
        count = prod(size)
        piece = self._scaled[scale][self._start : self._start + min(count, _POOL)]
        if count > _POOL:
            piece = piece.repeat(-(-count // _POOL))[:count]
        return piece.reshape(size)


def _byte_tokenizer() -> Any:
    """One token per byte; ids above them are never decoded to text, but may be in a prompt."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate(["<s>", "</s>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>")
