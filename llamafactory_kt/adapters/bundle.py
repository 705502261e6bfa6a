"""Format C, the KT bundle of kt-kernel 0.6 and later: stacked experts beside the adapter, and a manifest with checksums."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from ..ground.errors import KTAdapterError
from ..ground.file_hash import file_sha256
from ..ground.tensor_files import SafetensorsStore
from .config import LoraSettings
from .stacked import StackedAdapter

logger = logging.getLogger(__name__)

BUNDLE, MANIFEST = "fused_expert_lora.safetensors", "kt_adapter_manifest.json"


def open_bundle(directory: Path, settings: LoraSettings) -> StackedAdapter:
    """Open a KT bundle, with or without its manifest.

    Raises:
        KTAdapterError: A checksum of the manifest is wrong, or the tensors are.
    """
    if (directory / MANIFEST).is_file():
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
        size, digest = file.stat().st_size, file_sha256(file)
        if size != facts.get("size", size) or digest != facts.get("sha256", digest):
            raise KTAdapterError(
                f"{file} is not the file that {MANIFEST} describes (size or SHA-256 differ): it was changed or is damaged. "
                f"Copy the adapter again; if the change is intended, remove {MANIFEST}."
            )
