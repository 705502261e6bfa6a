"""Integers that ``llamafactory-kt quantize`` has written: a load reads what it would make itself, bit for bit, and refuses all else."""

from __future__ import annotations

import json
import resource
import shutil
from pathlib import Path

import pytest
import torch
from helpers.adapters import make_adapter
from helpers.children import child
from helpers.loading import answer, load
from helpers.marks import needs_native
from helpers.models import make_model
from safetensors.torch import load_file, save_file

from llamafactory_kt import (
    KTConfigError,
    KTModelError,
    KTOutputError,
    KTPathError,
    apply_adapter,
    optimize_for_inference,
    switch_adapter,
)
from llamafactory_kt.checkpoint.opening import open_checkpoint
from llamafactory_kt.decoding import quantized_linear
from llamafactory_kt.load_report import load_rows
from llamafactory_kt.model import memory
from llamafactory_kt.model.state import kt_state
from llamafactory_kt.native.quantized_tensor import QuantizedTensor
from llamafactory_kt.tools.quantize import quantize_model

pytestmark = [needs_native, pytest.mark.usefixtures("worker_threads")]
ARCHITECTURES = ["qwen3_moe", "deepseek_v2"]


@pytest.fixture(autouse=True, scope="module")
def none_is_small():
    """The layers of test models are."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quantized_linear, "SMALL", 256)
        yield


@pytest.fixture(scope="module", params=ARCHITECTURES)
def model(request, tmp_path_factory) -> Path:
    return make_model(tmp_path_factory.mktemp(request.param) / "model", request.param)


@pytest.fixture(scope="module")
def adapter(model) -> Path:
    return make_adapter(model.parent / "adapter", model, rank=4)


@pytest.fixture(scope="module")
def cached(model):
    """Makes the cache of a method, once."""

    def make(method: str) -> Path:
        output = model.parent / method
        if not output.exists():
            report = quantize_model(model, output, method)
            assert (report.method, report.kept) == (method.upper(), 0) and report.layers == len(
                open_checkpoint(model).experts
            )
            assert report.dense and report.nbytes == sum(f.stat().st_size for f in output.rglob("*") if f.is_file())
        return output

    return make


def ready(path: Path, adapter: Path | None, method: str, **keys):
    model = load(path, method.upper(), dense=method, **keys, **({"adapter": str(adapter)} if adapter else {}))
    if adapter:
        model, _ = apply_adapter(model, str(adapter))
    optimize_for_inference(model)
    return model


def integers(model) -> dict[str, torch.Tensor]:
    """All codes and scales that the model computes with, but for layers that no weight of the checkpoint is of."""
    found = {
        f"{wrapper.layer_idx} {number} {name} {part}": tensor
        for wrapper in kt_state(model).wrappers
        for number, expert in enumerate(wrapper.engine._weights)
        for name, weight in expert._asdict().items()
        for part, tensor in enumerate(weight.tensors)
    }
    for name, weight in model.named_parameters():
        if isinstance(weight, QuantizedTensor):
            found |= {f"{name} {part}": tensor for part, tensor in enumerate(weight.packed.tensors)}
    return found


def same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> bool:
    return found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("method", ["int8", "int4"])
def test_bit_for_bit_what_a_load_makes_of_the_checkpoint(model, adapter, cached, method, monkeypatch):
    needs, stock = [], memory.memory_need
    wanted = ready(model, adapter, method)
    whole = answer(wanted)
    monkeypatch.setattr(memory, "memory_need", lambda *given, **keys: needs.append(stock(*given, **keys)) or needs[-1])
    for how in ("mmap", "copy"):
        found = ready(model, adapter, method, load=how, weight_path=str(cached(method)))
        assert torch.equal(answer(found), whole) and same(integers(found), integers(wanted))
        rows, dense = dict(load_rows(found)), sum(isinstance(p, QuantizedTensor) for p in found.parameters())
        place = "mapped from its files" if how == "mmap" else "copied into huge pages"
        assert rows["Weights"].startswith(f"quantized before, in {cached(method)}, {place}")
        assert dense > 9 and rows["Linear layers"].endswith(f", {dense} of them quantized before")
        lie_in = {
            any(first <= tensor.data_ptr() < last for first, last in mappings(cached(method)))
            for tensor in integers(found).values()
        }
        assert lie_in == {how == "mmap"} and kt_state(found).options.mapped == (how == "mmap")
        nbytes = sum(wrapper.engine.nbytes for wrapper in kt_state(found).wrappers)
        assert (needs[-1].experts, needs[-1].loading > 0) == ((0, False) if how == "mmap" else (nbytes, True))
        switch_adapter(found, None)
        assert not torch.equal(answer(found), whole)
        switch_adapter(found, str(adapter))
        assert torch.equal(answer(found), whole)


def mappings(directory: Path) -> list[tuple[int, int]]:
    lines = [line.split() for line in Path("/proc/self/maps").read_text().splitlines() if str(directory) in line]
    return [tuple(int(address, 16) for address in line[0].split("-")) for line in lines]


def test_weights_that_are_not_the_checkpoints_any_more(model, cached):
    """An adapter or a program has changed them since: they are quantized as they are."""
    found = []
    for keys in ({}, {"weight_path": str(cached("int4"))}):
        loaded = load(model, "INT4", dense="int4", load="copy", **keys)
        loaded.lm_head.weight.data[3] *= 2
        loaded.model.layers[1].self_attn.o_proj.weight = torch.nn.Parameter(
            loaded.model.layers[1].self_attn.o_proj.weight * 2
        )
        optimize_for_inference(loaded)
        found.append(loaded)
    assert same(integers(found[1]), integers(found[0]))
    count = sum(isinstance(p, QuantizedTensor) for p in found[1].parameters())
    assert dict(load_rows(found[1]))["Linear layers"].endswith(
        f"{count} as int4, with a scale for each 32 weights, {count - 2} of them quantized before"
    )


def test_other_bits_around_the_experts(model, cached, tmp_path):
    wanted = load(model, "INT4", dense="int8")
    found = load(model, "INT4", dense="int8", weight_path=str(cached("int4")))
    for each in (wanted, found):
        optimize_for_inference(each)
    assert same(integers(found), integers(wanted))
    assert not dict(load_rows(found))["Linear layers"].endswith("before")
    report = quantize_model(model, tmp_path / "experts", "INT4", dense="same")
    assert report.dense == 0 and not list((tmp_path / "experts").glob("dense*"))
    report = quantize_model(model, tmp_path / "experts", "INT4", dense="int8")
    assert report.dense > 9 and report.layers == 0 and report.kept
    found = load(model, "INT4", dense="int8", weight_path=str(tmp_path / "experts"))
    optimize_for_inference(found)
    assert same(integers(found), integers(wanted)) and kt_state(found).cached_dense.used == report.dense


@pytest.mark.parametrize("model", ["qwen3_moe"], indirect=True)
def test_other_checkpoints(model, tmp_path):
    """One tensor for all experts; tied embeddings; weights that transformers converts."""
    fused = make_model(tmp_path / "fused", "qwen3_moe", save_original_format=False, tie_word_embeddings=True)
    quantize_model(fused, tmp_path / "of fused", "int4")
    wanted, found = (ready(fused, None, "int4", **keys) for keys in ({}, {"weight_path": str(tmp_path / "of fused")}))
    assert same(integers(found), integers(wanted)) and "lm_head.weight 0" in integers(found)
    assert kt_state(found).cached_dense.used == sum(isinstance(p, QuantizedTensor) for p in found.parameters())
    wide = make_model(tmp_path / "wide", "qwen3_moe", dtype=torch.float32)
    quantize_model(wide, tmp_path / "of wide", "int8")
    wanted, found = (ready(wide, None, "int8", **keys) for keys in ({}, {"weight_path": str(tmp_path / "of wide")}))
    assert same(integers(found), integers(wanted)) and kt_state(found).cached_dense.used == 0


def spoiled(cached, tmp_path) -> Path:
    return shutil.copytree(cached("int4"), tmp_path / "packed")


def cut(packed: Path) -> None:
    for name in LAST, DENSE:
        content = (packed / name).read_bytes()
        (packed / name).write_bytes(content[:-1])


def flip(name: str):
    def change(packed: Path) -> None:
        content = bytearray((packed / name).read_bytes())
        content[-1] ^= 1
        (packed / name).write_bytes(content)

    return change


def record(directory: str, **changes):
    def change(packed: Path) -> None:
        path = packed / directory / "layer.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return change


def more(packed: Path) -> None:
    save_file({"other": torch.zeros(3)}, packed / LAST)
    size = (packed / LAST).stat().st_size
    record("layer_2", files={"weights.safetensors": {"size": size, "sha256": ""}})(packed)


def to_kt_files(packed: Path) -> None:
    for directory in packed.iterdir():
        directory.rename(packed / f"_{directory.name}")


LAST, DENSE = "layer_2/weights.safetensors", "dense_int4/weights.safetensors"


@pytest.mark.parametrize("model", ["qwen3_moe"], indirect=True)
@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (cut, KTModelError, r"1 of 1 files are missing, truncated or of another size, first weights\.safetensors"),
        (lambda packed: (packed / LAST).unlink(), KTModelError, "1 of 1 files are missing, truncated"),
        (lambda packed: (packed / DENSE).unlink(), KTModelError, "dense_int4: 1 of 1 files are missing"),
        (flip(LAST), KTModelError, r"layer_2/weights\.safetensors has changed since it was made \(its SHA-256 differs\)"),
        (flip(DENSE), KTModelError, r"dense_int4/weights\.safetensors has changed since"),
        (record("layer_2", method="INT8"), KTModelError, r"was made with method INT8, wanted INT4\. Quantize"),
        (record("layer_2", hidden_size=64, group=64), KTModelError, "made with hidden_size 64, wanted 72; group 64, wanted 32"),
        (record("dense_int4", method="int8"), KTModelError, "dense_int4 was made with method int8, wanted int4"),
        (record("layer_2", fingerprint="0"), KTModelError, "made from other weights than the checkpoint's"),
        (record("layer_2", version=2), KTModelError, "is of version 2 of these files, and this package reads version 1"),
        (record("layer_2", files=[]), KTModelError, r"layer\.json is damaged"),
        (more, KTModelError, "weights.safetensors has other tensors than its record tells"),
        (lambda packed: (packed / "layer_2").rename(packed / "x"), KTPathError, "holds no integers of layer 2. llamafactory-kt quantize"),
        (to_kt_files, KTPathError, r"no integers of layer 0, but \.kt files, which are for kt_backend: AMXINT4"),
    ],
    ids=[
        "cut", "missing", "dense missing", "flipped", "dense flipped", "method", "sizes", "dense method", "fingerprint", "version", "record",
        "tensors", "layer", "kt-kernel's",
    ],
)  # fmt: skip
def test_files_that_are_wrong(model, cached, tmp_path, change, error, message):
    packed = spoiled(cached, tmp_path)
    change(packed)
    with pytest.raises(error, match=message):
        load(model, "INT4", dense="int4", weight_path=str(packed))


@pytest.mark.parametrize("model", ["qwen3_moe"], indirect=True)
def test_files_of_another_checkpoint(model, cached, tmp_path):
    other = make_model(tmp_path / "other", "qwen3_moe", seed=5)
    with pytest.raises(
        KTModelError, match="layer_0 was made from other weights than the checkpoint's, although the sizes"
    ):
        load(other, "INT4", weight_path=str(cached("int4")))
    with pytest.raises(
        KTModelError, match=r"layer_0 holds another model's or another method's weights \(method INT4, num_experts 6"
    ):
        quantize_model(other, cached("int4"), "int4")
    with pytest.raises(KTModelError, match="was made with method INT4, wanted INT8"):
        load(model, "INT8", weight_path=str(cached("int4")))
    changed = shutil.copytree(model, tmp_path / "changed")
    tensors = load_file(changed / "model.safetensors")
    tensors["model.layers.2.self_attn.q_proj.weight"][0, 0] += 1
    save_file(tensors, changed / "model.safetensors", {"format": "pt"})
    load(changed, "INT4", weight_path=str(cached("int4")))
    with pytest.raises(KTModelError, match="dense_int4 was made from other weights"):
        load(changed, "INT4", dense="int4", weight_path=str(cached("int4")))
    with pytest.raises(KTConfigError, match="merge_adapter: true cannot change the packed weights"):
        load(model, "INT4", merge_adapter=True, weight_path=str(cached("int4")))
    with pytest.raises(KTConfigError, match=r"--threadpool-count is for --method amxint8 and amxint4; int4 is not"):
        quantize_model(model, tmp_path / "o", "int4", pools=1)
    with pytest.raises(KTConfigError, match="--dense: unknown value 'int3', expected one of same, int8, int4"):
        quantize_model(model, tmp_path / "o", "int4", dense="int3")
    replaced = shutil.copytree(cached("int4"), tmp_path / "replaced")
    report = quantize_model(other, replaced, "int8", overwrite=True)
    assert not report.kept and report.layers and not (replaced / "dense_int4").exists()
    with pytest.raises(KTModelError, match="other is not empty, and holds no quantized layers"):
        quantize_model(model, tmp_path / "other", "int4", overwrite=True)


@pytest.mark.parametrize("model", ["qwen3_moe"], indirect=True)
def test_files_in_use_that_are_written_to(model, cached, tmp_path):
    packed = spoiled(cached, tmp_path)
    loaded = load(model, "INT4", load="mmap", weight_path=str(packed))
    answer(loaded)
    (packed / LAST).touch()
    with pytest.raises(
        KTModelError, match=r"layer_2/weights\.safetensors was written to while its weights were in use"
    ):
        answer(loaded)
    answer(load(model, "INT4", load="mmap", weight_path=str(packed)))  # its checksum is the same


@pytest.mark.parametrize("model", ["qwen3_moe"], indirect=True)
@pytest.mark.parametrize("where", ["engine, 'quantize_into'", "parts, 'write_record'"])
def test_a_killed_run_is_continued_to_the_same_bytes(model, cached, tmp_path, where):
    """While a layer's file is written, and after."""
    output = tmp_path / "int4"
    killed = (
        "import os, sys\nfrom llamafactory_kt.tools.quantize import parts, quantize_model\n"
        "from llamafactory_kt.engines.native import integers as engine\n"
        "from llamafactory_kt.decoding import quantized_linear\nquantized_linear.SMALL = 256\n"
        f"module, name = {where}\n"
        "stock = getattr(module, name)\n"
        "def once(*given):\n    if os.path.isdir(sys.argv[2] + '/layer_1'): os.kill(os.getpid(), 9)\n    return stock(*given)\n"
        "setattr(module, name, once)\n"
        "quantize_model(sys.argv[1], sys.argv[2], 'int4')\n"
    )
    result = child(killed, model, output)
    assert result.returncode == -9, result.stderr
    assert (output / "layer_1" / "layer.json").is_file() and not (output / "layer_2").exists()
    report = quantize_model(model, output, "int4")
    assert (report.layers, report.kept) == (1, 2)
    found, wanted = (
        {file.relative_to(root): file.read_bytes() for file in root.rglob("*.safetensors")}
        for root in (output, cached("int4"))
    )
    assert found == wanted and len(found) == 4
    assert sorted(p.name for p in output.iterdir()) == ["dense_int4", "layer_0", "layer_1", "layer_2"], (
        "nothing is left"
    )
    (output / LAST).write_bytes(b"")
    assert quantize_model(model, output, "int4").layers == 1 and (output / LAST).read_bytes() == wanted[Path(LAST)]


@pytest.mark.parametrize("model", ["qwen3_moe"], indirect=True)
def test_a_full_disk(model, cached, tmp_path, monkeypatch):
    size, before = (cached("int4") / LAST).stat().st_size, resource.getrlimit(resource.RLIMIT_FSIZE)
    for most in (size // 4, size // 2, size - 1):  # more than what is said meanwhile
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, before[1]))
        try:
            with pytest.raises(
                KTOutputError, match=r"layer_0 could not be written \(.* are free on its disk.*ulimit -f"
            ):
                quantize_model(model, tmp_path / "out", "int4")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert not list((tmp_path / "out").iterdir()), "nothing is left"
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("", (), {"free": 1000})())
    with pytest.raises(
        KTModelError, match=r"needs .* and 1000 bytes are free there|needs .* and 1\.0 KiB are free there"
    ):
        quantize_model(model, tmp_path / "none", "int4")
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("model", ["qwen3_moe"], indirect=True)
def test_a_weight_that_is_not_finite(model, tmp_path):
    for name, message in (
        ("model.layers.1.mlp.experts.3.up_proj.weight", "Expert 3 of layer 1 has values that are not finite"),
        ("model.layers.1.self_attn.q_proj.weight", "q_proj.weight has values that are not finite. Download"),
    ):
        path = shutil.copytree(model, tmp_path / name)
        tensors = load_file(path / "model.safetensors")
        tensors[name][5, 5] = torch.inf
        save_file(tensors, path / "model.safetensors", {"format": "pt"})
        with pytest.raises(KTModelError, match=message):
            quantize_model(path, tmp_path / "out", "int8")
        shutil.rmtree(tmp_path / "out")
