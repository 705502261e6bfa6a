"""Opening adapters. File names and headers tell the layout of a directory or a file."""

from __future__ import annotations

import logging
import os
from collections import Counter
from pathlib import Path

from ..ground.errors import KTAdapterError, KTPathError
from ..ground.tensors.stores import PickledStore, SafetensorsStore, TensorStore, has_store, is_there, open_store
from .adapter import Adapter
from .bundle import BUNDLE, open_bundle
from .config import CONFIG, LoraSettings
from .projections import ProjectionAdapter
from .stacked import MOE_LORA, is_stacked, open_moe_lora, open_stacked
from .target_parameters import TargetParametersAdapter, is_target_parameters

logger = logging.getLogger(__name__)


def open_adapter(directory: str | Path | None, moe_lora: str | Path | None = None) -> Adapter:
    """Open a local adapter of any layout by its headers.

    Args:
        directory: the adapter's directory; None with ``moe_lora`` alone.
        moe_lora: a ``moe_lora.pt`` with the routed experts' part, for a directory without it.

    Raises:
        KTPathError: There is no such directory or file.
        KTAdapterError: The configuration or a tensor file is missing, damaged, or of an unknown layout.
    """
    if moe_lora is not None and not os.path.isfile(moe_lora):
        raise KTPathError(f"{moe_lora} does not exist or is not a file.")
    if directory is None:
        if moe_lora is None:
            raise KTPathError("No adapter was given.")
        return open_moe_lora(Path(moe_lora), None, None)
    directory = Path(directory)
    if not os.path.isdir(directory):  # Path.is_dir raises OSError for some paths
        raise KTPathError(f"{directory} does not exist or is not a directory.")
    beside = directory / MOE_LORA
    has_moe_lora = moe_lora is None and is_there(beside)
    if has_moe_lora and not is_there(directory / CONFIG) and not has_store(directory):
        return open_moe_lora(beside, directory, None)
    settings = LoraSettings.read(directory / CONFIG)
    if is_there(directory / BUNDLE):
        adapter: Adapter = open_bundle(directory, settings)
    else:
        adapter = _open_peft(directory, settings, open_store(directory))
    if moe_lora is None and not has_moe_lora:
        return adapter
    if not adapter.layers:
        return open_moe_lora(Path(moe_lora or beside), directory, settings)
    if moe_lora is not None:
        raise KTAdapterError(
            f"Routed-expert LoRA was given twice: in {adapter.expert_file} and in {moe_lora}. Leave one of them out."
        )
    logger.warning("%s is not used: %s holds the experts' LoRA already.", beside, adapter.expert_file.name)
    return adapter


def open_files(tensors: Path, config: Path | None, lora_alpha: float) -> Adapter:
    """Open a tensor file and a configuration from any two places, for ``convert``.

    Args:
        tensors: an ``adapter_model.safetensors`` (or ``.bin``), stacked tensors (``.safetensors``), or a ``moe_lora.pt``.
        config: ``adapter_config.json``; None for the one beside the tensors. Without any, the rank is the tensors' and
            alpha is ``lora_alpha``. Stacked tensors and ``moe_lora.pt`` carry rank and alpha themselves.

    Raises:
        KTAdapterError: A file is damaged or of an unknown layout.
    """
    if tensors.suffix == ".pt":
        return open_moe_lora(tensors, None, None)
    beside = tensors.with_name(CONFIG)
    if tensors.name == BUNDLE:
        return open_bundle(tensors.parent, LoraSettings.read(config or beside))
    store = PickledStore(tensors) if tensors.suffix == ".bin" else SafetensorsStore(tensors)
    if isinstance(store, SafetensorsStore) and is_stacked(store):
        return open_stacked(store, LoraSettings.read(config) if config else None)
    if config is not None or beside.is_file():
        settings = LoraSettings.read(config or beside)
    else:
        ranks = Counter(
            info.shape[-2] for name, info in store.infos.items() if ".lora_A." in name and len(info.shape) > 1
        )
        rank = ranks.most_common(1)[0][0] if ranks else 8
        settings = LoraSettings(tensors, {"r": rank, "lora_alpha": lora_alpha})
    return _open_peft(tensors.parent, settings, store)


def _open_peft(directory: Path, settings: LoraSettings, store: TensorStore) -> Adapter:
    kind = TargetParametersAdapter if is_target_parameters(store) else ProjectionAdapter
    return kind(directory, settings, store)
