"""Merge a whole adapter into a checkpoint that stock transformers loads, one tensor at a time."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from ..adapters import Adapter, AdapterSet, ExpertLora, open_adapter
from ..adapters.keys import PROJECTIONS
from ..checkpoint.opening import MoEModel, open_checkpoint
from ..ground.atomic_output import check_apart, check_free, check_room, replacing
from ..ground.errors import KTAdapterError, KTModelError, name_some
from ..ground.json_files import read_json_object
from ..ground.tensors.stores import SafetensorsStore
from ..ground.tensors.writer import write_safetensors
from ..peft_side.changes import Replace
from ..peft_side.model_names import CheckpointNames, tied_weights
from ..peft_side.split import vocabulary_weights

logger = logging.getLogger(__name__)

_CONFIG = "config.json"
_TOKENIZER = ("tokenizer", "special_tokens_map", "added_tokens", "vocab", "merges", "chat_template")
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


def merge_adapter(
    model_path: str | Path, adapter_path: str | Path, output: str | Path, *, overwrite: bool = False
) -> MergeReport:
    """Write a checkpoint with attention, dense, shared-expert, router and routed-expert LoRA merged.

    Each weight becomes ``W + scaling * B @ A``, computed in float32 and rounded once to the stored dtype. Shards, tensor names
    and all other files are unchanged, unless the adapter makes two weights of embeddings and output layer that were one.

    Args:
        model_path: a local checkpoint directory in safetensors.
        adapter_path: a local adapter directory of any layout.
        output: a directory that does not exist or is empty.
        overwrite: it may also hold an earlier checkpoint, which goes when the new one is complete.

    Raises:
        KTPathError: A directory does not exist.
        KTModelError: The checkpoint is not in safetensors, or its experts do not follow the contract.
        KTAdapterError: The adapter does not fit, or has what cannot be merged. No output is left behind.
        KTOutputError: The output cannot be written; nothing of it is left.
    """
    source = Path(model_path).expanduser()
    earlier = _CONFIG if overwrite else None
    check_apart(Path(output), source, adapter_path)
    check_free(Path(output), earlier)
    moe, adapter = open_checkpoint(source), open_adapter(adapter_path)
    plan = _MergePlan(moe, adapter)
    total = sum(info.nbytes for store in plan.stores for info in store.infos.values())
    check_room(Path(output), total)
    with replacing(Path(output), earlier) as temporary:
        temporary.mkdir()
        with tqdm(total=total, unit="B", unit_scale=True, unit_divisor=1024, desc="Merging", delay=1.0) as bar:
            for store in plan.stores:
                tensors = plan.tensors(store, bar)
                write_safetensors(temporary / store.path.name, plan.names(store), tensors, store.metadata())
        for file in source.iterdir():
            if file.is_file() and file.suffix not in _WEIGHTS:
                shutil.copy2(file, temporary / file.name)
        if plan.unties:
            _untie(temporary, {other: store.path.name for store in plan.stores for other in plan.names(store)})
        if plan.vocabulary is not None:
            _write_vocabulary(temporary, *plan.vocabulary, adapter.directory)
        if plan.todo:
            raise KTAdapterError(
                f"{len(plan.todo)} weights that the adapter changes are missing from the checkpoint, first {name_some(sorted(plan.todo), 3)}."
            )
    count = sum(len(store.infos) for store in plan.stores)
    return MergeReport(str(output), len(moe.files), count, plan.merged, len(adapter.store.infos))


def _untie(directory: Path, files: dict[str, str]) -> None:
    """Have transformers load each of the weights that were one; ``files`` says in which file a tensor is."""
    index = directory / "model.safetensors.index.json"
    if index.is_file():
        content = read_json_object(index, KTModelError)
        index.write_text(json.dumps({**content, "weight_map": files}, indent=2) + "\n")

    def untie(config: dict[str, Any]) -> None:
        config["tie_word_embeddings"] = False

    _edit_config(directory, untie)


def _write_vocabulary(directory: Path, before: int, now: int, adapter: Path) -> None:
    """Note the number of tokens, and take over the tokenizer that was trained, where LLaMA-Factory saved it with the adapter."""

    def resize(config: dict[str, Any]) -> None:
        if config.get("vocab_size") == before:
            config["vocab_size"] = now

    _edit_config(directory, resize)
    for file in adapter.iterdir() if (adapter / "tokenizer_config.json").is_file() else ():
        if file.name.startswith(_TOKENIZER):
            shutil.copy2(file, directory / file.name)


def _edit_config(directory: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    """Edit ``config.json`` and the configurations of its parts (``text_config``)."""
    config = read_json_object(directory / _CONFIG, KTModelError)
    for part in (config, *config.values()):
        if part is config or (isinstance(part, dict) and part.keys() & {"tie_word_embeddings", "vocab_size"}):
            edit(part)
    (directory / _CONFIG).write_text(json.dumps(config, indent=2) + "\n")


def _resize(moe: MoEModel, adapter: Adapter) -> tuple[int, int] | None:
    """Give the empty model as many tokens as the adapter's whole embeddings have; the number before and after, if it changes."""
    [(_, part)] = moe.fit(AdapterSet((adapter,)), resizes=True)
    names = vocabulary_weights(moe.model)
    model: Any = moe.model
    before = model.get_input_embeddings().weight.shape[0]
    whole = [c for name in names for c in part.changes.get(name, ()) if isinstance(c, Replace)]
    now = {rows for change in whole for rows in change.shapes(adapter)[0][:1]} or {before}
    if len(now) > 1 or now == {before}:  # a contradiction is an error of the fit
        return None
    model.resize_token_embeddings(*now, mean_resizing=False)
    return before, now.pop()


class _MergePlan:
    """Maps each tensor of the checkpoint to the part of the adapter that changes it."""

    def __init__(self, moe: MoEModel, adapter: Adapter):
        self.adapter = adapter
        self.merged = 0
        names = moe.layout.names()
        self.vocabulary = _resize(moe, adapter)
        """the number of tokens before and after; None if it stays"""
        [(_, part)] = moe.fit(AdapterSet((adapter,)), finite=True)
        self._shapes = moe.shapes
        self._layouts = {module.layer: moe.layout.layer(module.name).layout for module in moe.experts}
        self._others = part.merged(adapter)
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
        self.beside: dict[str, list[str]] = {}
        """tensor of the checkpoint -> parameters that are the same weight there and another one from now on"""
        self.unties = False
        self._untie(tied_weights(moe.model))
        known = {*self._targets.values(), *chain(*self.beside.values())}
        if absent := [name for name in self._others if name not in known]:
            raise KTModelError(f"The checkpoint has no tensor for {name_some(absent, 3)}, which the adapter changes.")
        self.todo = set(self._others) | set(self._experts)

    def _untie(self, ties: Mapping[str, set[str]]) -> None:
        """Of weights that are one in the checkpoint, find those that the adapter makes two of."""
        stored = {target: name for name, target in self._targets.items()}
        for group in {frozenset({name, *others}) for name, others in ties.items()}:
            missing = sorted(group - stored.keys())
            if len({tuple(self._others.get(name, ())) for name in group}) > 1:
                self.unties = True
                self.beside[stored[next(iter(group & stored.keys()))]] = missing
            else:
                self._others = {name: changes for name, changes in self._others.items() if name not in missing}

    def names(self, store: SafetensorsStore) -> list[str]:
        """Of the tensors that are written in the place of a file."""
        return [name for stored in store.infos for name in (stored, *self.beside.get(stored, ()))]

    def tensors(self, store: SafetensorsStore, bar: Any) -> Iterator[tuple[str, torch.Tensor]]:
        for name, info in store.infos.items():
            value, target = store.read(name), self._targets[name]
            for other in self.beside.get(name, ()):
                yield other, self._changed(other, value)
            if name in self._experts:
                self.todo.discard(name)
                value = (value.float() + self._expert_delta(*self._experts[name], value)).to(value.dtype)
                self.merged += 1
            bar.update(info.nbytes)
            yield name, self._changed(target, value)

    def _changed(self, target: str, value: torch.Tensor) -> torch.Tensor:
        if target not in self._others:
            return value
        changed = value
        for change in self._others[target]:
            changed = change.apply(self.adapter, changed)
        self.merged += 1
        self.todo.discard(target)
        return changed.to(value.dtype)

    def _expert_delta(self, layer: int, piece: tuple[str, int | None], value: torch.Tensor) -> torch.Tensor:
        """ΔW of one expert's projection, or of a fused weight of all experts, in the checkpoint's orientation, float32."""
        if self._lora is None or self._lora.layer != layer:
            self._lora = self.adapter.read_layer(layer, self._shapes[layer])
        lora, (kind, expert) = self._lora, piece
        if kind in PROJECTIONS:
            return lora.delta(kind, slice(None) if expert is None else expert)
        parameter = lora.fused_delta(kind, self._layouts[layer], slice(None))
        return parameter if parameter.shape == value.shape else parameter.transpose(1, 2)
