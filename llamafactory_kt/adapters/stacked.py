"""Formats C and E: the experts of a layer stacked into six tensors, in a file beside the adapter.

C, the KT bundle (kt-kernel 0.6 and later): ``fused_expert_lora.safetensors`` with ``layers.{L}.experts.gate_lora_a``
and so on, and a ``kt_adapter_manifest.json`` with checksums. E, the SGLang converter's ``moe_lora.pt``:
``{"metadata": {...}, "layer_{L}": {"gate_lora_a": ...}}``. In both, a is [E, r, in] and b is [E, out, r].
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..ground.errors import KTAdapterError, name_some
from ..ground.tensor_files import (
    CombinedStore,
    NestedPickledStore,
    SafetensorsStore,
    TensorStore,
    has_store,
    open_store,
)
from .adapter import Adapter, ExpertsShape
from .config import LoraSettings
from .expert_lora import ExpertLora
from .keys import PROJECTIONS, belongs_to_experts

logger = logging.getLogger(__name__)

BUNDLE, MANIFEST, MOE_LORA = "fused_expert_lora.safetensors", "kt_adapter_manifest.json", "moe_lora.pt"
_NAME = re.compile(r"^(?:layers\.(\d+)\.experts|layer_(\d+))\.(gate|up|down)_lora_([ab])$")


class StackedAdapter(Adapter):
    """Six stacked tensors per layer, and one scaling.

    Raises:
        KTAdapterError: A tensor is missing, is not understood, or its shape does not go with the others'.
    """

    def __init__(
        self,
        directory: Path,
        settings: LoraSettings,
        store: TensorStore,
        experts: TensorStore,
        scaling: float,
        name: str,
    ):
        super().__init__(directory, settings, store)
        self.format, self._scaling, self._experts = name, scaling, experts
        self._names: dict[int, dict[tuple[str, str], str]] = {}
        for tensor in experts.infos:
            match = _NAME.match(tensor)
            if match is None:
                raise KTAdapterError(f"{experts.path}: the tensor {tensor} is not one of this format's.")
            self._names.setdefault(int(match[1] or match[2]), {})[match[3], match[4]] = tensor
        both = [tensor for tensor in store.infos if tensor not in experts.infos and belongs_to_experts(tensor)]
        if both:
            raise KTAdapterError(
                f"{directory} holds routed-expert LoRA twice: {len(both)} tensors in {store.infos[both[0]].file.name} (first "
                f"{both[0]}) and {experts.path.name}. Remove one of them."
            )
        for layer, names in self._names.items():
            self._check_layer(layer, names)

    def _shape(self, name: str) -> tuple[int, ...]:
        return self._experts.infos[name].shape

    def _check_layer(self, layer: int, names: dict[tuple[str, str], str]) -> None:
        missing = [f"{p}_lora_{side}" for p in PROJECTIONS for side in "ab" if (p, side) not in names]
        if missing:
            raise KTAdapterError(
                f"{self._experts.path}: layer {layer} has no {name_some(missing, 6)}; the file is incomplete."
            )
        for projection in PROJECTIONS:
            a, b = self._shape(names[projection, "a"]), self._shape(names[projection, "b"])
            if len(a) != 3 or len(b) != 3 or a[0] != b[0] or a[1] != b[2]:
                raise KTAdapterError(
                    f"{self._experts.path}: layer {layer}, {projection}: a has shape {a} and b {b}; wanted [E, r, in] and "
                    "[E, out, r]."
                )

    @property
    def expert_names(self) -> list[str]:
        return list(self._experts.infos)

    @property
    def expert_file(self) -> Path:
        return self._experts.path

    @property
    def layers(self) -> list[int]:
        return sorted(self._names)

    def rank(self, layer: int) -> int:
        return max(self._shape(self._names[layer][p, "a"])[1] for p in PROJECTIONS)

    def scaling(self, layer: int) -> float:
        return self._scaling

    def own_shapes(self) -> dict[int, ExpertsShape]:
        shapes = {}
        for layer, names in self._names.items():
            experts, _, intermediate = self._shape(names["down", "a"])
            shapes[layer] = ExpertsShape(experts, self._shape(names["down", "b"])[1], intermediate)
        self.check_fits(shapes)
        return shapes

    def check_fits(self, shapes: Mapping[int, ExpertsShape]) -> None:
        for layer in self.layers:
            shape = self.require_layer(layer, shapes)
            for projection in PROJECTIONS:
                a = self._shape(self._names[layer][projection, "a"])
                found = (a[0], self._shape(self._names[layer][projection, "b"])[1], a[2])
                wanted = (shape.num_experts, *shape.projection(projection))
                if found != wanted:
                    raise KTAdapterError(
                        f"{self._experts.path}: layer {layer}, {projection}_proj: LoRA for {found[0]} experts of {found[1]} x "
                        f"{found[2]}, the model's are {wanted[0]} of {wanted[1]} x {wanted[2]}.{self.trained_for}"
                    )

    def read_layer(self, layer: int, shape: ExpertsShape) -> ExpertLora:
        names, rank = self._names[layer], self.rank(layer)
        a = {p: self._experts.read(names[p, "a"]) for p in PROJECTIONS}
        b = {p: self._experts.read(names[p, "b"]) for p in PROJECTIONS}
        pad = torch.nn.functional.pad
        return ExpertLora(
            layer,
            {p: pad(t, (0, 0, 0, rank - t.shape[1])) for p, t in a.items()},
            {p: pad(t, (0, rank - t.shape[2])) for p, t in b.items()},
            {p: torch.full((shape.num_experts, rank), self._scaling, dtype=torch.float64) for p in PROJECTIONS},
        )


def open_bundle(directory: Path, settings: LoraSettings) -> StackedAdapter:
    """Open a KT bundle (format C), with or without its manifest.

    Raises:
        KTAdapterError: A checksum of the manifest is wrong, or the tensors are.
    """
    alpha: float = settings.lora_alpha
    if (directory / MANIFEST).is_file():
        _check_manifest(directory, settings)
    fused = SafetensorsStore(directory / BUNDLE)
    store = CombinedStore(open_store(directory), fused) if has_store(directory) else fused
    if settings.use_rslora:
        logger.warning(
            "%s sets use_rslora; kt-kernel trained the experts with alpha / r all the same, and so they are applied.",
            settings.path,
        )
    return StackedAdapter(directory, settings, store, fused, alpha / settings.r, "KT bundle")


def is_stacked(store: TensorStore) -> bool:
    """Whether a file holds stacked expert tensors and nothing else."""
    return bool(store.infos) and all(_NAME.match(name) for name in store.infos)


def open_stacked(store: SafetensorsStore, settings: LoraSettings | None) -> StackedAdapter:
    """Open one safetensors file of stacked tensors; rank and alpha are its metadata's, else the configuration's.

    Raises:
        KTAdapterError: Neither gives rank and alpha, or they contradict each other.
    """
    metadata = store.metadata()
    try:
        rank, alpha = int(metadata["lora_rank"]), float(metadata["lora_alpha"])
    except (KeyError, ValueError) as error:
        if settings is None:
            raise KTAdapterError(
                f"{store.path} holds stacked expert LoRA, but neither a configuration nor its metadata gives lora_rank and "
                "lora_alpha."
            ) from error
    else:
        if settings is not None and settings.lora_alpha / settings.r != alpha / rank:
            raise KTAdapterError(
                f"{store.path} was written with lora_rank {rank} and lora_alpha {alpha:g}; {settings.path} says "
                f"{settings.r} and {settings.lora_alpha:g}. Leave --config out."
            )
        settings = LoraSettings(path=store.path, r=rank, lora_alpha=alpha, raw={"r": rank, "lora_alpha": alpha})
    return StackedAdapter(
        store.path.parent, settings, store, store, settings.lora_alpha / settings.r, "stacked experts"
    )


def _check_manifest(directory: Path, settings: LoraSettings) -> None:
    """Check sizes and SHA-256 sums. The base model's absolute path is that of the training machine: not compared."""
    path = directory / MANIFEST
    try:
        manifest: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        version, status, artifacts = manifest["version"], manifest["status"], dict(manifest["artifacts"])
        lora = dict(manifest.get("lora") or {})
    except (ValueError, KeyError, TypeError) as error:
        raise KTAdapterError(f"{path} is not a KT adapter manifest: {error!r}.") from error
    if version != 1 or status != "ready":
        raise KTAdapterError(f"{path}: expected version 1 and status 'ready', found {version!r} and {status!r}.")
    for key, wanted in (("rank", settings.r), ("alpha", settings.lora_alpha)):
        if key in lora and lora[key] != wanted:
            raise KTAdapterError(
                f"{path}: {key} is {lora[key]}, {settings.path.name} says {wanted}; the two do not belong together."
            )
    for name, facts in artifacts.items():
        file = directory / name
        if Path(name).name != name or not file.is_file():
            raise KTAdapterError(f"{path} lists {name!r}, which is not a file beside it.")
        with file.open("rb") as handle:
            digest = hashlib.file_digest(handle, "sha256").hexdigest()
        if file.stat().st_size != facts.get("size", file.stat().st_size) or digest != facts.get("sha256", digest):
            raise KTAdapterError(
                f"{file} is not the file that {MANIFEST} describes (size or SHA-256 differ): it was changed or is damaged. "
                f"Copy the adapter again; if the change is meant, remove {MANIFEST}."
            )


def open_moe_lora(file: Path, directory: Path | None, settings: LoraSettings | None) -> StackedAdapter:
    """Open ``moe_lora.pt`` (format E), alone or beside an adapter that has no expert LoRA of its own.

    Rank and alpha are those of its metadata.

    Raises:
        KTAdapterError: It cannot be read safely, its metadata is incomplete, or the tensors are wrong.
    """
    experts = NestedPickledStore(file)
    metadata = experts.metadata
    rank, alpha = metadata.get("lora_rank"), metadata.get("lora_alpha")
    if not isinstance(rank, int) or rank < 1 or not isinstance(alpha, int | float):
        raise KTAdapterError(f"{file}: metadata must give lora_rank and lora_alpha, found {metadata}.")
    settings = settings or LoraSettings(path=file, r=rank, lora_alpha=alpha, raw={"r": rank, "lora_alpha": alpha})
    store = CombinedStore(open_store(directory), experts) if directory is not None and has_store(directory) else experts
    return StackedAdapter(directory or file.parent, settings, store, experts, alpha / rank, "moe_lora.pt")
