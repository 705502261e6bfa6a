"""Format C, the KT bundle of kt-kernel 0.6 and later: stacked experts beside the adapter, and a manifest with checksums."""

from __future__ import annotations

import json
import logging
from pathlib import Path

from pydantic import BaseModel, ValidationError

from ..ground.errors import KTAdapterError
from ..ground.file_hash import file_sha256
from ..ground.json_files import problems, read_json_object
from ..ground.tensors.stores import SafetensorsStore, is_there
from .config import LoraSettings
from .stacked import StackedAdapter

logger = logging.getLogger(__name__)

BUNDLE, MANIFEST = "fused_expert_lora.safetensors", "kt_adapter_manifest.json"


class _Lora(BaseModel):
    rank: int | None = None
    alpha: float | None = None


class _Artifact(BaseModel):
    size: int | None = None
    sha256: str | None = None


class _Manifest(BaseModel):
    version: int
    status: str
    artifacts: dict[str, _Artifact]
    lora: _Lora | None = None


def open_bundle(directory: Path, settings: LoraSettings) -> StackedAdapter:
    """Open a KT bundle, with or without its manifest.

    Raises:
        KTAdapterError: A checksum of the manifest is wrong, or the tensors are.
    """
    if is_there(directory / MANIFEST):
        _check_manifest(directory, settings)
    if settings.use_rslora:
        logger.warning(
            "%s sets use_rslora; kt-kernel trained the experts with alpha / r all the same, so their LoRA is applied with alpha / r.",
            settings.path,
        )
    return StackedAdapter(
        directory,
        settings,
        SafetensorsStore(directory / BUNDLE),
        settings.lora_alpha / settings.r,
        "KT bundle",
        rest=True,
    )


def write_manifest(directory: Path, base: str | None, rank: int, alpha: float) -> None:
    """Describe all files of a complete bundle; ``base`` is the base model's name or path."""
    artifacts = {file.name: {"size": file.stat().st_size, "sha256": file_sha256(file)} for file in directory.iterdir()}
    manifest = {
        "version": 1,
        "status": "ready",
        "base": {"model_name_or_path": base},
        "lora": {"rank": rank, "alpha": alpha},
        "artifacts": dict(sorted(artifacts.items())),
    }
    (directory / MANIFEST).write_text(json.dumps(manifest, indent=2), encoding="utf-8")


def _check_manifest(directory: Path, settings: LoraSettings) -> None:
    """Check sizes and SHA-256 sums. The base model is not compared: its path is that of the training machine."""
    path = directory / MANIFEST
    try:
        manifest = _Manifest.model_validate(read_json_object(path, KTAdapterError))
    except ValidationError as error:
        raise KTAdapterError(f"{path} is not a KT adapter manifest: {problems(error)}.") from error
    if manifest.version != 1 or manifest.status != "ready":
        raise KTAdapterError(
            f"{path}: expected version 1 and status 'ready', found {manifest.version!r} and {manifest.status!r}."
        )
    lora = manifest.lora or _Lora()
    for key, found, wanted in (("rank", lora.rank, settings.r), ("alpha", lora.alpha, settings.lora_alpha)):
        if found is not None and found != wanted:
            raise KTAdapterError(
                f"{path}: {key} is {found:g}, {settings.path.name} says {wanted:g}; the two do not belong together."
            )
    for name, artifact in manifest.artifacts.items():
        file = directory / name
        if Path(name).name != name or not file.is_file():
            raise KTAdapterError(f"{path} lists {name!r}, which is not a file beside it.")
        size, digest = file.stat().st_size, file_sha256(file)
        if artifact.size not in (None, size) or artifact.sha256 not in (None, digest):
            raise KTAdapterError(
                f"{file} is not the file that {MANIFEST} describes (size or SHA-256 differ): it was changed or is damaged. "
                f"Copy the adapter again; if the change is intended, remove {MANIFEST}."
            )
