"""Where an adapter is looked for: in directories, and in the Hugging Face cache."""

from __future__ import annotations

import pytest
from helpers.expert_tensors import broken, experts_tensors, save

from llamafactory_kt.adapters import locate_adapter, open_adapter
from llamafactory_kt.ground.errors import KTPathError


def test_paths(tmp_path, monkeypatch):
    directory = broken(tmp_path)
    assert locate_adapter(str(directory)) == directory
    assert locate_adapter(str(tmp_path), subfolder="broken") == directory
    for name, message in (
        (str(tmp_path / "none"), "does not exist"),
        (str(directory / "adapter_config.json"), "is a file"),
    ):
        with pytest.raises(KTPathError, match=message):
            locate_adapter(name)
    with pytest.raises(KTPathError, match="does not exist"):
        open_adapter(tmp_path / "none")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "saves").mkdir()
    with pytest.raises(KTPathError, match="does not exist"):  # below a directory that exists: never asked of the hub
        locate_adapter("saves/mistyped")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(KTPathError, match="neither a local directory nor an adapter that could be fetched"):
        locate_adapter("someone/adapter", cache_dir=str(tmp_path / "cache"))


def test_hub_id_is_taken_from_the_cache_like_llamafactory_does(tmp_path, monkeypatch):
    """A repository as huggingface_hub caches it, found offline by its id."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    repository = tmp_path / "cache" / "models--someone--adapter"
    commit = "0" * 40
    save(repository / "snapshots" / commit, experts_tensors(lambda e, p: 3))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    assert open_adapter(locate_adapter("someone/adapter", cache_dir=str(tmp_path / "cache"))).layers == [2]
