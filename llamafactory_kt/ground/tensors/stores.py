"""Tensor files, opened by their headers; values are read one tensor at a time."""

from __future__ import annotations

import os
import pickle
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError

from ..errors import KTAdapterError, KTError, first_line, name_some
from ..json_files import read_json_object
from .safetensors_files import open_mapped, read_header, read_tensor

SAFETENSORS, INDEX, PICKLED = "adapter_model.safetensors", "adapter_model.safetensors.index.json", "adapter_model.bin"

DTYPES = {
    torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32", torch.float64: "F64", torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2", torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8",
    torch.uint8: "U8", torch.bool: "BOOL", torch.float8_e8m0fnu: "F8_E8M0",
}  # fmt: skip
"""safetensors' names"""

_LONGEST_NAME = 1_000
_KEEP_MAPPED = 256 * 2**20
"""bytes read from files after which they are opened anew: what was read counts as resident memory while its file is open"""


def bits(dtype: str) -> int:
    """The size of a value, by safetensors' name of its dtype.

    >>> bits("BF16"), bits("F8_E4M3"), bits("BOOL")
    (16, 8, 8)
    """
    digits = re.search(r"\d+", dtype)
    return int(digits[0]) if digits else 8


@dataclass(frozen=True)
class TensorInfo:
    """One tensor, by its header."""

    shape: tuple[int, ...]
    dtype: str
    """safetensors' name: ``BF16``, ``F32`` ..."""
    nbytes: int
    file: Path


def all_finite(tensor: torch.Tensor) -> bool:
    """Whether a tensor holds neither NaN nor Inf. The sum keeps both and is faster to check; it may also overflow, so each value
    is checked if it is not finite."""
    return bool(torch.isfinite(tensor.sum())) or bool(torch.isfinite(tensor).all())


class TensorStore(Protocol):
    """Named tensors on disk."""

    path: Path
    """the file to name in messages"""
    infos: dict[str, TensorInfo]

    def read(self, name: str) -> torch.Tensor: ...


def _check_names(file: Path, names: Iterable[str]) -> None:
    """Names are printed, and searched with regular expressions."""
    if strange := next((name for name in names if not name.isprintable() or len(name) > _LONGEST_NAME), None):
        raise KTAdapterError(f"{file}: {strange!r:.120} is no name of a tensor.")


class SafetensorsStore:
    """One or several safetensors files.

    Raises:
        KTAdapterError: A file is damaged or not safetensors, a name is none of a tensor, or two files hold the same tensor.
    """

    def __init__(self, path: Path, files: list[Path] | None = None):
        self.path = path
        self.infos: dict[str, TensorInfo] = {}
        self._metadata: dict[str, str] = {}
        self._handles: dict[Path, Any] = {}
        """of the files that were read last"""
        self._read = 0
        for file in files or [path]:
            self._open(file)

    def _open(self, file: Path) -> None:
        try:
            tensors, metadata = read_header(file)
        except OSError as error:
            raise KTAdapterError(f"{file} cannot be read: {error.strerror}.") from error
        except SafetensorError as error:
            raise KTAdapterError(
                f"{file} cannot be read as safetensors ({error}). It is damaged, incomplete, or another format under "
                "this name (torch.save writes .pt or .bin): copy or save it again."
            ) from error
        _check_names(file, tensors)
        for name, tensor in tensors.items():
            if name in self.infos:
                raise KTAdapterError(f"The tensor {name} stands both in {self.infos[name].file} and in {file}.")
            self.infos[name] = TensorInfo(tensor.shape, tensor.dtype, tensor.stop - tensor.start, file)
        self._metadata = self._metadata or metadata

    def metadata(self) -> dict[str, str]:
        """The first file's own metadata that has any."""
        return dict(self._metadata)

    def read(self, name: str) -> torch.Tensor:
        info = self.infos[name]
        self._read += info.nbytes
        if self._read > _KEEP_MAPPED:
            self._handles.clear()
            self._read = info.nbytes
        if info.file not in self._handles:
            self._handles[info.file] = open_mapped(info.file)
        return read_tensor(self._handles[info.file], name)


class PickledStore:
    """A ``.bin`` file written by ``torch.save``, read with ``weights_only=True``: no code in it is executed.

    Raises:
        KTAdapterError: The file is damaged, or holds anything but named tensors.
    """

    def __init__(self, path: Path):
        self.path = path
        try:
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError) as error:
            raise KTAdapterError(
                f"{path} cannot be read safely ({first_line(error)}). Pickled files may hold code, so only plain tensors are "
                "accepted: save the adapter as safetensors with PEFT's save_pretrained."
            ) from error
        tensors = self._named(content) if isinstance(content, dict) else None
        if tensors is None or not all(isinstance(n, str) and isinstance(t, torch.Tensor) for n, t in tensors.items()):
            raise KTAdapterError(f"{path} must hold named tensors and nothing else; it has another structure.")
        _check_names(path, tensors)
        if odd := [n for n, t in tensors.items() if t.layout != torch.strided or t.is_quantized or t.is_meta]:
            raise KTAdapterError(
                f"{path}: {name_some(odd, 3)}: sparse, quantized or without values; save plain tensors."
            )
        self._tensors = tensors
        self.infos = {
            name: TensorInfo(tuple(t.shape), DTYPES.get(t.dtype, str(t.dtype)), t.nbytes, path)
            for name, t in tensors.items()
        }

    def _named(self, content: dict[str, Any]) -> dict[str, torch.Tensor] | None:
        return content

    def read(self, name: str) -> torch.Tensor:
        return self._tensors[name]


class NestedPickledStore(PickledStore):
    """``{"metadata": {...}, group: {name: tensor}}``, as SGLang's converter writes it; tensors are named ``group.name``.

    Raises:
        KTAdapterError: The file is damaged, or of another structure.
    """

    metadata: dict[str, Any]

    def _named(self, content: dict[str, Any]) -> dict[str, torch.Tensor] | None:
        self.metadata = content.pop("metadata", None)
        if not all(isinstance(part, dict) for part in (self.metadata, *content.values())):
            return None
        return {f"{key}.{name}": tensor for key, group in content.items() for name, tensor in group.items()}


class CombinedStore:
    """Several stores as one. Messages name the first one's file."""

    def __init__(self, *stores: TensorStore):
        self.path = stores[0].path
        self._stores = {name: store for store in stores for name in store.infos}
        self.infos = {name: store.infos[name] for name, store in self._stores.items()}

    def read(self, name: str) -> torch.Tensor:
        return self._stores[name].read(name)


def is_there(file: Path) -> bool:
    """Whether an adapter has this file.

    Raises:
        KTAdapterError: Something else is in its place. Passing over it could pass over a part of the adapter: files in the hub's cache are
            links.
    """
    if os.path.isfile(file):  # Path.is_file raises OSError for some paths
        return True
    if os.path.lexists(file):
        raise KTAdapterError(f"{file} is no regular file, or a link to none: copy or download the adapter again.")
    return False


def has_store(directory: Path) -> bool:
    """Whether an adapter directory holds a file that :func:`open_store` would open."""
    return any(is_there(directory / name) for name in (SAFETENSORS, INDEX, PICKLED))


def open_store(directory: Path) -> TensorStore:
    """Open the tensors of an adapter directory: single or sharded safetensors, else ``adapter_model.bin``.

    Raises:
        KTAdapterError: There is no tensor file, a shard is missing, or a file is damaged.
    """
    if is_there(directory / SAFETENSORS):
        return SafetensorsStore(directory / SAFETENSORS)
    if is_there(directory / INDEX):
        return _open_shards(directory / INDEX)
    if is_there(directory / PICKLED):
        return PickledStore(directory / PICKLED)
    found = name_some(sorted(p.name for p in directory.iterdir())) or "nothing"
    raise KTAdapterError(f"{directory} holds no {SAFETENSORS} (nor {INDEX}, {PICKLED}); it holds {found}.")


def _open_shards(index: Path) -> SafetensorsStore:
    store = SafetensorsStore(index, shards(index, KTAdapterError))
    if absent := [name for name in read_json_object(index, KTAdapterError)["weight_map"] if name not in store.infos]:
        raise KTAdapterError(
            f"{index} names {name_some(absent, 3)}, which no file beside it holds; the adapter is incomplete."
        )
    return store


def shards(index: Path, error: type[KTError]) -> list[Path]:
    """The files that a safetensors index names, all of them beside it.

    Raises:
        KTError: ``error``, if the index is damaged or a file is missing.
    """
    files = read_json_object(index, error).get("weight_map")
    if not isinstance(files, dict) or not files or not all(isinstance(name, str) for name in files.values()):
        raise error(f"{index} is not a safetensors index: weight_map must give each tensor's file.")
    names = sorted(set(files.values()))
    for name in names:
        if Path(name).name != name or not os.path.isfile(index.parent / name):
            raise error(f"{index} names the shard {name!r:.120}, which is not a file beside it.")
    return [index.parent / name for name in names]
