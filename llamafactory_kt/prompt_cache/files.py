"""Beginnings that many conversations share (a long system prompt, tools) in files: their keys and values survive a restart.

A safetensors file for each, named after the hash of all that the numbers depend on, with the hash of its tensors in the metadata. Only
caches whose layers can all be cut are kept so.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError

from ..ground.atomic_output import replacing
from ..ground.errors import KTError, one_line
from ..ground.tensors.safetensors_files import open_mapped, read_header, read_tensor
from ..ground.tensors.writer import write_safetensors
from . import layers

logger = logging.getLogger(__name__)

LEAST = 64
"""tokens: fewer are computed as fast as they are read"""


class PromptFiles:
    """The files of one model with one set of adapters.

    Args:
        directory: made when the first is written.
        facts: all that the numbers depend on besides the tokens; JSON values.
        most_nbytes: of all files in it. The least recently used are removed.
    """

    def __init__(self, directory: Path, facts: Any, most_nbytes: int):
        self._directory, self._facts, self._most_nbytes = directory, json.dumps(facts), most_nbytes

    def _file(self, ids: np.ndarray) -> Path:
        name = hashlib.sha256(self._facts.encode() + np.ascontiguousarray(ids, np.int64).tobytes()).hexdigest()
        return self._directory / f"{name[:32]}.safetensors"

    def read(self, ids: np.ndarray, cache: Any) -> bool:
        """Fill an empty cache with the keys and values of these tokens; whether there are any. A damaged file is said and removed."""
        file = self._file(ids)
        if not file.is_file():
            return False
        try:
            infos, metadata = read_header(file)
            with open_mapped(file) as handle:
                tensors = {name: read_tensor(handle, name) for name in infos}
            if metadata.get("sha256") != _sha256(tensors):
                raise ValueError("its checksum is wrong")
            layers.fill(cache, len(ids), tensors, json.loads(metadata["layers"]))
            os.utime(file)  # used last
        except (SafetensorError, KTError, OSError, ValueError, LookupError, TypeError) as error:
            logger.warning("%s is ignored, and written again: %s", file, one_line(error))
            file.unlink(missing_ok=True)
            return False
        return True

    def write(self, ids: np.ndarray, cache: Any) -> None:
        """Write the first tokens of a cache, if they are not there. A failure is a warning."""
        file = self._file(ids)
        if len(ids) < LEAST or layers.fixed(cache) or file.is_file():
            return
        tensors, kinds = layers.parts(cache, len(ids))
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            with replacing(file) as temporary:
                metadata = {"sha256": _sha256(tensors), "layers": json.dumps(kinds), "facts": self._facts}
                write_safetensors(temporary, list(tensors), tensors.items(), metadata)
            self._remove_oldest()
        except (OSError, KTError) as error:
            logger.warning("The beginning of the prompt is not kept in %s: %s", self._directory, one_line(error))

    def _remove_oldest(self) -> None:
        files = sorted(self._directory.glob("*.safetensors"), key=lambda file: file.stat().st_mtime, reverse=True)
        total = 0
        for file in files:
            total += file.stat().st_size
            if total > self._most_nbytes:
                file.unlink(missing_ok=True)


def _sha256(tensors: dict[str, torch.Tensor]) -> str:
    found = hashlib.sha256()
    for name in sorted(tensors):
        found.update(name.encode())
        found.update(tensors[name].contiguous().flatten().view(torch.uint8).numpy().data)
    return found.hexdigest()
