"""Where a checkpoint says how it is quantized: ``quantization_config`` of its ``config.json``, older ``compression_config``, or ModelOpt's
``hf_quant_config.json`` beside it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ...ground.errors import KTModelError
from .values import Values

_KEYS = ("quantization_config", "compression_config")
_OURS = "kt_experts"
_ADAPTER = "adapter_config.json"


def check_file(name: str | Path) -> None:
    """Check a local ``config.json`` before transformers reads it, whose own log fails on a configuration that is no object, and that there
    is no adapter beside it, of which transformers by itself would apply all but the experts' part.

    Args:
        name: checkpoint directory, or a name on the hub, of which nothing is read.

    Raises:
        KTModelError: A ``quantization_config`` is no object, the directory is an adapter's (too), or what it has is GGUF.
    """
    directory = Path(os.path.expanduser(name))
    file = directory / "config.json"
    if os.path.lexists(directory / _ADAPTER):
        advice = (
            "move the adapter's files to a directory of their own, and give that as adapter_name_or_path"
            if os.path.lexists(file)
            else "give this directory as adapter_name_or_path, and its base model as model_name_or_path"
        )
        raise KTModelError(f"{directory} is given as the model, and holds an adapter ({_ADAPTER}): {advice}.")
    if found := _gguf(directory):
        raise KTModelError(
            f"{found} is a model in GGUF, llama.cpp's format, which use_kt does not read: it takes checkpoints in safetensors. Download the "
            "model's own repository, not one of its GGUF conversions; kt_backend: INT4 makes it as small while it is loaded."
        )
    try:
        whole = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return  # transformers says so
    for key in _KEYS:
        if isinstance(whole, dict) and whole.get(key) is not None:
            Values(whole[key], f"config.json of {file.parent}", key)


def _gguf(place: Path) -> Path | None:
    """A file in GGUF that is all that there is: itself, or one in a directory without safetensors."""
    if place.suffix.lower() == ".gguf":
        return place
    if not place.is_dir() or any(place.glob("*.safetensors")):
        return None
    return next(iter(sorted(place.glob("*.gguf"))), None)


def stored_values(config: Any) -> Values | None:
    """What says how a checkpoint's weights are quantized, with its ``quant_method``; None if nothing does.

    Args:
        config: the model's configuration; of a composite model, also that of its text model may say it.

    Raises:
        KTModelError: It is no object, or the file beside ``config.json`` cannot be read.
    """
    directory = Path(str(getattr(config, "name_or_path", None) or "."))
    file = f"config.json of {directory}" if directory.name else "config.json"
    for key, stored in _stored(config):
        if stored is None or stored == {}:
            continue
        found = Values(stored.to_dict() if hasattr(stored, "to_dict") else stored, file, key)
        method = found.found.get("quant_method") or _producer(found)
        return Values({**found.found, "quant_method": getattr(method, "value", method)}, file, key)
    beside = directory / "hf_quant_config.json"
    return _modelopt(beside) if directory.name and beside.is_file() else None


def _stored(config: Any) -> Iterator[tuple[str, Any]]:
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    for part in (config, text):
        for key in _KEYS:
            stored: Any = getattr(part, key, None)
            if getattr(stored, "quant_method", None) == _OURS:  # ours replaces the checkpoint's own
                stored = stored.checkpoint or _in_file(config, key)
            yield key, stored


def _in_file(config: Any, key: str) -> Any:
    """What transformers has left out, as it does not know the method."""
    file = Path(str(getattr(config, "name_or_path", None) or ".")) / "config.json"
    return json.loads(file.read_text(encoding="utf-8")).get(key) if file.is_file() else None


def _producer(found: Values) -> str | None:
    return found.section("producer").text("name")


def _modelopt(file: Path) -> Values | None:
    """What NVIDIA's ModelOpt writes: ``{"producer": {"name": "modelopt", …}, "quantization": {"quant_algo": "FP8", …}}``."""
    try:
        read = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise KTModelError(f"{file} cannot be read as JSON ({error}); download or copy it again.") from error
    place = f"{file.name} of {file.parent}"
    whole = Values(read, place, "the file")
    producer = _producer(whole)
    if producer != "modelopt":
        raise KTModelError(
            f"{place}: The checkpoint was quantized by {producer}, and config.json does not say how. Use a checkpoint with a "
            "quantization_config in config.json, or the model's unquantized checkpoint."
        )
    return Values({**whole.section("quantization").found, "quant_method": producer}, place, "quantization")
