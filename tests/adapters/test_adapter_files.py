"""Opening an adapter's files: formats that are read, and files that are damaged or dangerous."""

from __future__ import annotations

import json
import pickle

import pytest
import torch
from helpers.expert_tensors import FIRST, SHAPE, Hostile, broken, experts_tensors, save
from safetensors.torch import load_file, save_file

from llamafactory_kt.adapters import open_adapter
from llamafactory_kt.ground.errors import KTAdapterError


def test_files_that_are_not_safetensors(tmp_path):
    directory = broken(tmp_path)
    file = directory / "adapter_model.safetensors"
    whole = file.read_bytes()
    for damaged in (whole[: len(whole) // 2], whole[:4], b"", b"{}" * 50, b"\xff" * 4096):
        file.write_bytes(damaged)
        with pytest.raises(KTAdapterError, match="cannot be read as safetensors"):
            open_adapter(directory)
    torch.save({"a": torch.ones(2)}, file)  # a torch file under this name
    with pytest.raises(KTAdapterError, match="another format under this name"):
        open_adapter(directory)


def test_pickled_adapter_is_read_without_running_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    directory = broken(tmp_path)
    tensors = load_file(directory / "adapter_model.safetensors")
    (directory / "adapter_model.safetensors").unlink()
    torch.save(tensors, directory / "adapter_model.bin")
    lora = open_adapter(directory).read_layer(2, SHAPE)
    assert torch.equal(lora.a["gate"][0], tensors[FIRST])
    for payload in (Hostile(), {"a": Hostile()}, {"a": 1}, [torch.ones(1)]):
        torch.save(payload, directory / "adapter_model.bin")
        with pytest.raises(KTAdapterError, match=r"adapter_model\.bin"):
            open_adapter(directory)
    (directory / "adapter_model.bin").write_bytes(pickle.dumps(Hostile()))
    with pytest.raises(KTAdapterError, match="cannot be read safely"):
        open_adapter(directory)
    assert not (tmp_path / "hostile-code-was-run").exists()


def test_sharded_adapter(tmp_path):
    tensors = experts_tensors(lambda e, p: 3)
    directory = save(tmp_path, tensors)
    (directory / "adapter_model.safetensors").unlink()
    names = list(tensors)
    parts = {
        "adapter_model-00001-of-00002.safetensors": names[:7],
        "adapter_model-00002-of-00002.safetensors": names[7:],
    }
    for file, part in parts.items():
        save_file({name: tensors[name] for name in part}, directory / file)
    index = {"weight_map": {name: file for file, part in parts.items() for name in part}}
    index_file = directory / "adapter_model.safetensors.index.json"
    index_file.write_text(json.dumps(index))
    adapter = open_adapter(directory)
    assert sorted(adapter.expert_names) == sorted(tensors)
    index["weight_map"][names[0]] = "../../etc/passwd"
    index_file.write_text(json.dumps(index))
    with pytest.raises(KTAdapterError, match="not a file beside it"):
        open_adapter(directory)


def test_links_in_an_adapter_directory(tmp_path):
    """The hub's cache consists of links to files. A broken link, a link to a directory and a circle each give one clear
    error."""
    tensors = experts_tensors(lambda e, p: 3)
    real = save(tmp_path / "blobs", tensors)
    linked = tmp_path / "snapshot"
    linked.mkdir()
    for file in real.iterdir():
        (linked / file.name).symlink_to(file)
    assert sorted(open_adapter(linked).expert_names) == sorted(tensors)
    (tmp_path / "link").symlink_to(linked)
    assert open_adapter(tmp_path / "link").layers == [2]
    file = linked / "adapter_model.safetensors"
    for target in ("nowhere", tmp_path, file):
        file.unlink()
        file.symlink_to(target)
        with pytest.raises(KTAdapterError, match=r"adapter_model\.safetensors is no regular file, or a link to none"):
            open_adapter(linked)
