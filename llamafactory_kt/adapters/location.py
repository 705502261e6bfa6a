"""Where an adapter is: a local directory, or a repository on the Hugging Face hub."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from ..ground.errors import KTPathError, first_line

_FILES = ["adapter_config.json", "adapter_model*", "*.safetensors", "*.json", "moe_lora.pt"]
_HUB_ID = re.compile(r"^[\w.-]+/[\w.-]+$")


def looks_local(name: str) -> bool:
    """Whether a name can only mean a local path: it is not of the form ``organisation/name``."""
    return name.startswith(("/", ".", "~")) or not _HUB_ID.match(name)


def adapter_looks_local(name: str) -> bool:
    """The same for an adapter: ``saves/name`` is also a local path if ``saves`` is a directory here."""
    return looks_local(name) or os.path.isdir(Path(name).parent)


def locate_adapter(
    name: str, source: str = "adapter_name_or_path", *, subfolder: str | None = None, **hub: Any
) -> Path:
    """The directory of an adapter. A hub id is downloaded into the cache that LLaMA-Factory and PEFT use.

    Args:
        name: a path, or a name on the hub.
        source: what the name was given as, for messages.
        subfolder: in which the adapter is.
        hub: ``revision``, ``cache_dir`` and ``token`` for ``huggingface_hub.snapshot_download``.

    Raises:
        KTPathError: The path does not exist, or the hub has no such repository or cannot be reached.
    """
    path = Path(os.path.expanduser(name))  # Path.expanduser raises RuntimeError for ~nobody
    if not os.path.exists(path) and not adapter_looks_local(name):
        from huggingface_hub import snapshot_download

        try:
            patterns = [f"{subfolder}/{pattern}" for pattern in _FILES] if subfolder else _FILES
            path = Path(snapshot_download(name, allow_patterns=patterns, **hub))
        except Exception as error:  # huggingface_hub raises a dozen types; all mean the same here
            raise KTPathError(
                f"{source}: {name} is neither a local directory nor an adapter that could be fetched "
                f"from the hub ({type(error).__name__}: {first_line(error)})."
            ) from error
    if os.path.isfile(path):
        raise KTPathError(f"{source}: {path} is a file; give the directory that holds adapter_config.json.")
    if subfolder:
        path = path / subfolder
    if not os.path.isdir(path):
        raise KTPathError(f"{source}: {path} does not exist.")
    return path
