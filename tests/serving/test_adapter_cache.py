"""The cache of prepared adapters."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from helpers.adapters import edit_adapter, make_adapter
from helpers.children import KT, child
from safetensors.torch import load_file

from llamafactory_kt import KTAdapterError, KTPathError
from llamafactory_kt.serving import adapter_cache


def test_cache_is_keyed_by_content(build, adapter, model, tmp_path, cache):
    def entry(path: Path) -> Path:
        return Path(build(adapter_name_or_path=str(path)).parsed.lora_paths[0].partition("=")[2]).parent

    first = entry(adapter)
    assert (first / "merged").stat().st_mode & 0o111 == 0o111, "others than root can enter it, too"
    written = (first / "merged" / "adapter_model.safetensors").stat().st_mtime_ns
    copy = shutil.copytree(adapter, tmp_path / "copy")
    assert entry(adapter) == entry(copy) == first, "the same content in another place is the same entry"
    assert (first / "merged" / "adapter_model.safetensors").stat().st_mtime_ns == written, "and is not written again"
    edit_adapter(copy, lambda tensors: {name: tensor + 1 for name, tensor in tensors.items()})
    second = entry(copy)
    assert second != first
    (first / "merged" / "adapter_model.safetensors").write_bytes(b"cut off")
    assert load_file(entry(adapter) / "merged" / "adapter_model.safetensors"), "a damaged entry is made anew"

    shutil.rmtree(copy)
    listed = child(KT, "cache", "list").stdout
    assert "2 prepared adapter(s)" in listed and "(gone)" in listed
    assert "Removed 1 " in child(KT, "cache", "clean", "--gone").stdout
    assert not second.exists() and first.exists()
    assert "Removed 1 " in child(KT, "cache", "clean").stdout
    assert [path.name for path in cache.iterdir()] == [".lock"]


def test_nothing_is_left_of_an_adapter_that_cannot_be_prepared(build, adapter, tmp_path, cache, model, monkeypatch):
    def spoil(tensors):
        next(tensor for name, tensor in tensors.items() if ".experts.3." in name)[0, 0] = float("nan")
        return tensors

    broken = edit_adapter(make_adapter(tmp_path / "broken", model), spoil)
    with pytest.raises(KTAdapterError, match="NaN"):
        build(adapter_name_or_path=str(broken))
    assert [path.name for path in cache.iterdir()] == [".lock"] and adapter_cache.entries() == []
    monkeypatch.setenv("LLAMAFACTORY_KT_CACHE", str(tmp_path / "broken" / "adapter_config.json"))
    with pytest.raises(KTPathError, match=r"cannot be written .* in LLAMAFACTORY_KT_CACHE"):
        build(adapter_name_or_path=str(adapter))
