"""Merge a whole adapter into a checkpoint that stock transformers loads, one tensor at a time."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from ..adapters import Adapter, AdapterSet, ExpertLora, open_adapter
from ..adapters.keys import PROJECTIONS, split_module
from ..checkpoint.opening import MoEModel, open_checkpoint
from ..ground.atomic_output import check_free, replacing
from ..ground.errors import KTAdapterError, KTModelError, name_some
from ..ground.tensor_files import SafetensorsStore
from ..ground.tensor_writer import write_safetensors
from ..peft_side.model_names import CheckpointNames
from ..peft_side.split import PeftPart

logger = logging.getLogger(__name__)

_WEIGHTS = {".safetensors", ".bin", ".pt", ".pth", ".gguf"}


@dataclass(frozen=True)
class MergeReport:
    """What :func:`merge_adapter` wrote."""

    output: str
    files: int
    tensors: int
    merged: int
    """tensors of the checkpoint that were changed"""
    adapter_tensors: int
    """tensors of the adapter; all of them were merged"""


def merge_adapter(model_path: str | Path, adapter_path: str | Path, output: str | Path) -> MergeReport:
    """Write a checkpoint with attention, dense, shared-expert, router and routed-expert LoRA merged.

    Each weight becomes ``W + scaling * B @ A``, computed in float32 and rounded once to the stored dtype. Shards, tensor names
    and all other files are unchanged.

    Args:
        model_path: a local checkpoint directory in safetensors.
        adapter_path: a local adapter directory of any layout.
        output: a directory that does not exist or is empty.

    Raises:
        KTPathError: A directory does not exist.
        KTModelError: The checkpoint is not in safetensors, or its experts do not follow the contract.
        KTAdapterError: The adapter does not fit, or has DoRA or biases, which cannot be merged by a sum. No output is left
            behind.
    """
    source = Path(model_path).expanduser()
    check_free(Path(output))
    moe, adapter = open_checkpoint(source), open_adapter(adapter_path)
    plan = _MergePlan(moe, adapter)
    with replacing(Path(output)) as temporary:
        temporary.mkdir()
        total = sum(info.nbytes for store in plan.stores for info in store.infos.values())
        with tqdm(total=total, unit="B", unit_scale=True, unit_divisor=1024, desc="Merging", delay=1.0) as bar:
            for store in plan.stores:
                tensors = plan.tensors(store, bar)
                write_safetensors(temporary / store.path.name, store.infos.keys(), tensors, store.metadata())
        for file in source.iterdir():
            if file.is_file() and file.suffix not in _WEIGHTS:
                shutil.copy2(file, temporary / file.name)
        if plan.todo:
            raise KTAdapterError(
                f"{len(plan.todo)} weights that the adapter changes are missing from the checkpoint, first {name_some(sorted(plan.todo), 3)}."
            )
    count = sum(len(store.infos) for store in plan.stores)
    return MergeReport(str(output), len(moe.files), count, plan.merged, len(adapter.store.infos))


class _MergePlan:
    """Maps each tensor of the checkpoint to the part of the adapter that changes it."""

    def __init__(self, moe: MoEModel, adapter: Adapter):
        self.adapter = adapter
        self.merged = 0
        names = moe.layout.names()
        [(_, part)] = moe.fit(AdapterSet((adapter,)), finite=True)
        self._shapes = moe.shapes
        self._layouts = {module.layer: moe.layout.layer(module.name).layout for module in moe.experts}
        self._others = self._plan_others(part)
        self._experts = {
            tensor: (module.layer, piece)
            for module in moe.experts
            if module.layer in adapter.layers
            for tensor, piece in names[module.name].items()
            if piece[0] not in module.biases
        }
        self.stores = [SafetensorsStore(file) for file in moe.files]
        checkpoint = CheckpointNames(moe.model)
        self._targets = {name: checkpoint.renamed(name) for store in self.stores for name in store.infos}
        self._lora: ExpertLora | None = None
        known = set(self._targets.values())
        if absent := [name for name in self._others if name not in known]:
            raise KTModelError(f"The checkpoint has no tensor for {name_some(absent, 3)}, which the adapter changes.")
        self.todo = set(self._others) | set(self._experts)

    def _plan_others(self, part: PeftPart) -> dict[str, dict[str, str]]:
        """parameter -> {``lora_A.weight``: tensor, ``lora_B.weight``: tensor}, or {``weight``: tensor} for a saved module"""
        planned: dict[str, dict[str, str]] = {}
        for module, tensors in {**part.modules, **part.routers}.items():
            for tensor in tensors:
                kind = split_module(tensor)[1]
                if kind in ("lora_A.weight", "lora_B.weight"):
                    planned.setdefault(f"{module}.weight", {})[kind] = tensor
                elif kind in ("weight", "bias"):
                    planned[f"{module}.{kind}"] = {"weight": tensor}
                else:
                    raise KTAdapterError(
                        f"{self.adapter.store.path}: {tensor} cannot be merged by a sum (DoRA, bias or embedding)."
                    )
        for name, halves in planned.items():
            if "weight" not in halves and len(halves) != 2:
                raise KTAdapterError(f"{self.adapter.store.path}: {name} has only {name_some(halves.values())}.")
        return planned

    def tensors(self, store: SafetensorsStore, bar: Any) -> Iterator[tuple[str, torch.Tensor]]:
        for name, info in store.infos.items():
            value = store.read(name)
            target = self._targets[name]
            if name in self._experts:
                value = (value.float() + self._expert_delta(*self._experts[name], value)).to(value.dtype)
            elif target in self._others:
                value = self._merge_other(target, value)
            if name in self._experts or target in self._others:
                self.merged += 1
                self.todo -= {name, target}
            bar.update(info.nbytes)
            yield name, value

    def _merge_other(self, target: str, value: torch.Tensor) -> torch.Tensor:
        halves = self._others[target]
        if "weight" in halves:
            return self.adapter.read(halves["weight"]).to(value.dtype).reshape(value.shape)
        names = [halves[f"lora_{side}.weight"] for side in "AB"]
        a, b = (self.adapter.read(name).float().flatten(1) for name in names)  # of a convolution, B has windows of one
        scaling = self.adapter.settings.scaling(split_module(names[0])[0], a.shape[0])
        return (value.float() + scaling * (b @ a).view_as(value)).to(value.dtype)

    def _expert_delta(self, layer: int, piece: tuple[str, int | None], value: torch.Tensor) -> torch.Tensor:
        """ΔW of one expert's projection, or of a fused weight of all experts, in the checkpoint's orientation, float32."""
        if self._lora is None or self._lora.layer != layer:
            self._lora = self.adapter.read_layer(layer, self._shapes[layer])
        lora, (kind, expert) = self._lora, piece
        if kind in PROJECTIONS:
            return lora.delta(kind, slice(None) if expert is None else expert)
        parameter = lora.fused_delta(kind, self._layouts[layer], slice(None))
        return parameter if parameter.shape == value.shape else parameter.transpose(1, 2)
