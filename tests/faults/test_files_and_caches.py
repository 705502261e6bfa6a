"""Checkpoint files larger than memory, and caches that hold something else than what was written there."""

from __future__ import annotations

import json
import os
import random
import stat
from pathlib import Path

import psutil
import pytest
import torch
from helpers.adapters import make_adapter
from helpers.loading import load
from helpers.models import make_model
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from llamafactory_kt import KTAdapterError, KTMemoryError
from llamafactory_kt.adapters import open_adapter
from llamafactory_kt.ground.measurements import Remembered
from llamafactory_kt.ground.tensors.safetensors_files import open_mapped, read_header
from llamafactory_kt.serving import adapter_cache


def enlarge(model: Path, size: int) -> None:
    """Give a tiny model a vocabulary so large that its one file, which has no blocks on the disk, is larger than ``size``."""
    file = model / "model.safetensors"
    raw = file.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header, config = json.loads(raw[8 : 8 + length]), json.loads((model / "config.json").read_text())
    config["vocab_size"] = size // config["hidden_size"] // 2
    start = 0
    for name, entry in sorted(header.items()):
        if name != "__metadata__":
            if name in ("model.embed_tokens.weight", "lm_head.weight"):
                entry["shape"][0] = config["vocab_size"]
            stop = start + 2 * int(torch.tensor(entry["shape"]).prod())
            entry["data_offsets"], start = [start, stop], stop
    text = json.dumps(header).encode()
    with file.open("wb") as handle:
        handle.write(len(text).to_bytes(8, "little") + text)
        handle.truncate(8 + len(text) + start)
    (model / "config.json").write_text(json.dumps(config))


@pytest.fixture
def more_than_memory() -> int:
    if Path("/proc/sys/vm/overcommit_memory").read_text().strip() == "1":
        pytest.skip("this system maps whatever it is asked to")
    return 2 * (psutil.virtual_memory().total + psutil.swap_memory().total)


def test_a_file_larger_than_memory(tmp_path, more_than_memory):
    """It ended in safetensors' "unable to mmap", before memory was checked."""
    model = make_model(tmp_path / "model", "qwen3_moe")
    enlarge(model, more_than_memory)
    with pytest.raises(KTMemoryError, match=r"The experts of 3 layers need .* GiB are free\. Free memory"):
        load(model, "torch")
    with pytest.raises(KTMemoryError, match=r"is one file of .* Save the model in shards"):
        open_mapped(model / "model.safetensors")


def test_an_adapter_larger_than_memory(tmp_path, more_than_memory):
    model = make_model(tmp_path / "model", "qwen3_moe")
    adapter = make_adapter(tmp_path / "adapter", model)
    file = adapter / "adapter_model.safetensors"
    names = {name: entry.shape for name, entry in read_header(file)[0].items()}
    header, start = {}, 0
    for name, shape in names.items():
        rows = more_than_memory // 4 if "layers.0.self_attn.q_proj.lora_B" in name else shape[0]
        size = 4 * rows * shape[1]
        header[name] = {"dtype": "F32", "shape": [rows, shape[1]], "data_offsets": [start, start + size]}
        start += size
    text = json.dumps(header).encode()
    with file.open("wb") as handle:
        handle.write(len(text).to_bytes(8, "little") + text)
        handle.truncate(8 + len(text) + start)
    assert open_adapter(adapter).other_names
    with pytest.raises(KTAdapterError, match="q_proj"):
        load(model, "torch", adapter=[str(adapter)])


def test_headers_as_safetensors_reads_them(tmp_path):
    """Of whole files, and of files with any kind of damage: both refuse the same ones."""
    whole = tmp_path / "whole.safetensors"
    save_file(
        {"a": torch.ones(3, 5), "b": torch.ones(7).bfloat16(), "empty": torch.ones(0, 4)}, whole, {"format": "pt"}
    )
    raw, seed = whole.read_bytes(), 26
    damaged = [raw, raw[:7], raw[:8], raw[:60], raw[:-1], raw + b"x", b"", b"\xff" * 40, raw.replace(b"BF16", b"BF17")]
    damaged += [
        raw.replace(b"[0,", b"[1,"),
        raw.replace(b"[3,5]", b"[5,3]"),
        raw.replace(b"[3,5]", b"[3,6]"),
        raw.replace(b"[7]", b"[9]"),
    ]
    random_ = random.Random(seed)
    for _ in range(300):
        spoiled = bytearray(raw)
        spoiled[random_.randrange(len(raw))] = random_.randrange(256)
        damaged.append(bytes(spoiled))
    refused = 0
    for content in damaged:
        file = tmp_path / "x.safetensors"
        file.write_bytes(content)
        try:
            with safe_open(file, framework="pt") as handle:
                wanted = {
                    name: (tuple(handle.get_slice(name).get_shape()), handle.get_slice(name).get_dtype())
                    for name in handle.keys()  # noqa: SIM118
                }
        except (SafetensorError, OSError):
            wanted = None
        try:
            found = {name: (entry.shape, entry.dtype) for name, entry in read_header(file)[0].items()}
        except (SafetensorError, OSError):
            found = None
            refused += 1
        assert found == wanted, (seed, content)
    assert 20 < refused < len(damaged)


def test_what_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "pipe.safetensors")
    (tmp_path / "folder.safetensors").mkdir()
    for name in ("pipe", "folder"):
        with pytest.raises((SafetensorError, OSError)):
            read_header(tmp_path / f"{name}.safetensors")


# --- caches ---


@pytest.fixture
def times(tmp_path, monkeypatch) -> Remembered:
    monkeypatch.setenv("LLAMAFACTORY_KT_CACHE", str(tmp_path / "cache"))
    return Remembered({"what": "a test"})


BROKEN = {
    "empty": b"", "binary": b"\xff\xfe\x00", "text": b"hello", "list": b"[]", "number": b"3", "deep": b"[" * 200_000, "null": b"null",
    "foreign": b'{"facts": {}, "measured": 3}', "huge number": b"9" * 5000, "infinite": b'{"facts": Infinity}',
}  # fmt: skip


@pytest.mark.parametrize("content", BROKEN.values(), ids=BROKEN)
def test_broken_measurements_are_ignored(times, content, kt_log):
    times.keep([1.5])
    assert times.recall(list) == [1.5] and not kt_log.records
    times.file.write_bytes(content)
    assert times.recall(list) is None
    times.keep([2.5])
    assert times.recall(list) == [2.5]
    assert len(kt_log.records) <= 1 and all(not record.exc_info for record in kt_log.records)


def test_measurements_of_another_form(times, kt_log):
    times.keep("infinity")
    assert times.recall(lambda found: int(float(found))) is None, "OverflowError"
    assert "is ignored and written again" in kt_log.text


PLACES = {
    "a folder in the place of the file": lambda file: (file / "x").mkdir(parents=True),
    "a file in the place of the folder": lambda file: (file.parent.parent.mkdir(), file.parent.write_text("")),
    "a file in the place of the cache": lambda file: file.parent.parent.write_text(""),
    "a link to nothing": lambda file: (file.parent.parent.mkdir(), file.parent.symlink_to("/nothing/there")),
}


@pytest.mark.parametrize("place", PLACES)
def test_measurements_that_cannot_be_kept(times, place, kt_log):
    PLACES[place](times.file)
    assert times.recall(list) is None
    times.keep([1.5])
    (record,) = kt_log.records
    assert "could not be kept in" in record.getMessage() and "\n" not in record.getMessage()


def test_caches_are_private(times, tmp_path):
    (tmp_path / "cache" / "calibration").mkdir(parents=True, mode=0o755)
    times.keep([1.5])
    assert stat.S_IMODE(times.file.parent.stat().st_mode) == 0o700
    with adapter_cache._locked(adapter_cache._root()):
        assert stat.S_IMODE(adapter_cache._root().stat().st_mode) == 0o700


def test_a_new_cache_is_private_as_a_whole(times, tmp_path):
    times.keep([1.5])
    assert stat.S_IMODE((tmp_path / "cache").stat().st_mode) == 0o700


ENTRIES = {
    "a file": lambda path: path.write_text("x"),
    "a link": lambda path: path.symlink_to("/nothing/there"),
    "an empty folder": Path.mkdir,
    "a list": lambda path: (path.mkdir(), (path / "entry.json").write_text("[]")),
    "files as a list": lambda path: (path.mkdir(), (path / "entry.json").write_text('{"source": "", "form": "", "created": 1, "files": [1]}')),
    "sizes as texts": lambda path: (path.mkdir(), (path / "entry.json").write_text('{"source": "", "form": "", "created": 1, "files": {"x": "y"}}')),
    "deep": lambda path: (path.mkdir(), (path / "entry.json").write_text("[" * 100_000)),
}  # fmt: skip


@pytest.mark.parametrize("entry", ENTRIES)
def test_prepared_adapters_that_are_none(tmp_path, cache, entry):
    adapter = open_adapter(make_adapter(tmp_path / "adapter", make_model(tmp_path / "model", "qwen3_moe")))
    make = lambda folder: (folder / "x").write_text("whole")  # noqa: E731
    path = adapter_cache.prepared(adapter, "form", None, make)
    adapter_cache.clean()
    ENTRIES[entry](path)
    assert adapter_cache.entries() == []
    assert adapter_cache.prepared(adapter, "form", None, make) == path and (path / "x").read_text() == "whole"
    assert len(adapter_cache.entries()) == 1
