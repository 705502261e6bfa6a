"""INT8 and INT4 experts: their arithmetic, and the packed weights on disk."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from conftest import needs_kernel
from test_experts import answer, batch, layer, load, lora_for, make_engine, reference, worker_threads  # noqa: F401
from tiny import make_adapter, make_model, merged_float32, per_token, rel

from llamafactory_kt import KTConfigError, KTModelError, KTPathError, apply_adapter, switch_adapter
from llamafactory_kt.adapters import ExpertsShape
from llamafactory_kt.engines.ktkernel.packed_files import read_record
from llamafactory_kt.tools.quantize import quantize_model

pytestmark = needs_kernel
# Errors on random weights, which have no outliers and no structure; LoRA is bf16 in all of them.
BOUNDS = {"AMXINT8": 0.03, "AMXINT4": 0.25}


@pytest.mark.parametrize("shape", [ExpertsShape(5, 128, 256), ExpertsShape(6, 72, 40)], ids=str)
@pytest.mark.parametrize("tokens", [1, 37])
def test_int4_against_float64(shape, tokens):
    weights, lora = layer(shape), lora_for(shape, rank=5, scaling=3.2)
    engine = make_engine("AMXINT4", shape, weights, rank=5, scaling=3.2)
    compare(engine, weights, lora, shape, tokens, "AMXINT4")


def compare(engine, weights, lora, shape, tokens, method):
    """Base and whole against float64; the LoRA effect against the same base weights' effect."""
    x, index, scores = batch(shape, tokens)
    base = engine.forward(x, index, scores).double()
    engine.set_lora(lora)
    whole = engine.forward(x, index, scores).double()
    wanted = reference(weights, None, x, index, scores), reference(weights, lora, x, index, scores)
    assert rel(base, wanted[0]) < BOUNDS[method]
    assert rel(whole, wanted[1]) < BOUNDS[method]
    effect = wanted[1] - wanted[0]
    assert torch.cosine_similarity((whole - base).flatten(), effect.flatten(), dim=0) > 0.99
    assert rel(wanted[1], wanted[0]) > 0.5


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    root = tmp_path_factory.mktemp("packed")
    model = make_model(root / "model", "deepseek_v2")
    adapter = make_adapter(root / "adapter", model, rank=4)
    for method in ("int8", "int4"):
        report = quantize_model(model, root / method, method)
        assert (report.layers, report.kept) == (2, 0)
    return root, model, adapter


@pytest.mark.parametrize("method", BOUNDS)
def test_a_model_on_packed_weights(files, method):
    """From the files as from the checkpoint; with an adapter, near the float32 model; and used again by a second load."""
    root, path, adapter = files
    weights = str(root / method[3:].lower())
    keys = {"backend": method, "adapter": str(adapter), "weight_path": weights}
    model = load(path, **keys)
    base = answer(model)
    if method == "AMXINT4":
        while_loading = load(path, backend=method, adapter=str(adapter))
        assert per_token(base.float(), answer(while_loading).float()) < 0.02
    with torch.inference_mode():
        float32 = [merged_float32(path, a)(input_ids=torch.arange(2, 40)[None]).logits for a in (None, adapter)]
    model, report = apply_adapter(model, adapter)
    whole = answer(model)
    assert report.experts + report.peft == report.total
    # the rest of the model is bf16 and the routers see other inputs, so a model's bound is wider than a layer's
    assert per_token(base.float(), float32[0]) < 3 * BOUNDS[method]
    assert per_token(whole.float(), float32[1]) < 3 * BOUNDS[method]
    expected = model._kt_wrappers[0].engine.nbytes
    assert expected < 0.6 * 3 * 6 * 128 * 128 * 2
    switch_adapter(model, None)
    assert torch.equal(answer(model), base)
    del model
    assert torch.equal(answer(load(path, **keys)), base), "the same kernel objects"


def test_an_interrupted_run_is_continued_to_the_same_bytes(files, tmp_path):
    root, path, _ = files
    output = tmp_path / "int8"
    killed = (
        "import os, sys\nfrom llamafactory_kt import quantize\nwrite = quantize.write_record\n"
        "def once(directory, record):\n    if output_exists(): os.kill(os.getpid(), 9)\n    write(directory, record)\n"
        "def output_exists(): return os.path.isdir(sys.argv[2] + '/_layer_1')\n"
        "quantize.write_record = once\n"
        "if __name__ == '__main__': quantize.quantize_model(sys.argv[1], sys.argv[2], 'int8')\n"
    )
    (tmp_path / "killed.py").write_text(killed)
    result = subprocess.run([sys.executable, tmp_path / "killed.py", path, output], capture_output=True, text=True)
    assert result.returncode == -9, result.stderr
    assert (output / "_layer_1" / "layer.json").is_file() and not (output / "_layer_2").exists()
    report = quantize_model(path, output, "int8")
    assert (report.layers, report.kept) == (1, 1)
    found, wanted = ({f.relative_to(r): f.read_bytes() for f in r.rglob("*.kt")} for r in (output, root / "int8"))
    assert found == wanted and len(found) == 2 * 6 * 6
    assert sorted(p.name for p in output.iterdir()) == ["_layer_1", "_layer_2"], "nothing is left of what was killed"


@pytest.fixture
def packed(files, tmp_path):
    """A copy of the INT8 weights to spoil."""
    import shutil

    return shutil.copytree(files[0] / "int8", tmp_path / "packed")


def first_file(packed):
    return packed / "_layer_1" / sorted(read_record(packed / "_layer_1")[1])[0]


def truncate(packed):
    first_file(packed).write_bytes(first_file(packed).read_bytes()[:-1])


def flip(packed):
    content = bytearray(first_file(packed).read_bytes())
    content[0] ^= 1
    first_file(packed).write_bytes(content)


def record(**changes):
    def change(packed):
        path = packed / "_layer_2" / "layer.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return change


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (truncate, KTModelError, r"1 of 36 files are missing, truncated or of another size, first _numa_0/INT8_down_0"),
        (lambda packed: first_file(packed).unlink(), KTModelError, r"1 of 36 files are missing"),
        (flip, KTModelError, r"INT8_down_0.* has changed since it was made \(its SHA-256 differs\)"),
        (record(method="AMXINT4"), KTModelError, r"was made with method AMXINT4, wanted AMXINT8\. Quantise"),
        (record(pools=2, hidden_size=96), KTModelError, r"made with pools 2, wanted 1; hidden_size 96, wanted 64"),
        (record(fingerprint="0"), KTModelError, r"made from other weights than the checkpoint's"),
        (record(files=[]), KTModelError, r"layer\.json is damaged"),
        (lambda packed: (packed / "_layer_2").rename(packed / "x"), KTPathError, r"no \.kt files of layer 2"),
    ],
    ids=["truncated", "missing", "flipped", "method", "sizes", "model", "record", "layer"],
)
def test_packed_weights_that_are_wrong(files, packed, change, error, message):
    change(packed)
    with pytest.raises(error, match=message):
        load(files[1], backend="AMXINT8", weight_path=str(packed))


def test_weights_of_kt_kernels_own_converter(packed, files, kt_log):
    """They have no record: what their names and sizes tell is checked."""
    for path in packed.glob("_layer_*/layer.json"):
        path.unlink()
    wanted = answer(load(files[1], backend="AMXINT8", weight_path=str(files[0] / "int8")))
    assert torch.equal(answer(load(files[1], backend="AMXINT8", weight_path=str(packed))), wanted)
    assert "only the sizes of its files are checked" in kt_log.text
    next(packed.glob("_layer_1/_numa_0/INT8_up_3_*_scale_.kt")).write_bytes(b"")
    with pytest.raises(KTModelError, match="1 of 36 files are missing, truncated"):
        load(files[1], backend="AMXINT8", weight_path=str(packed))


def test_another_model_into_the_same_directory(packed, tmp_path):
    other = make_model(tmp_path / "other", "deepseek_v2", seed=5)
    with pytest.raises(KTModelError, match=r"_layer_1 holds another model's or another method's weights \(AMXINT8"):
        quantize_model(other, packed, "int8")


def test_what_is_asked_for_wrongly(files, tmp_path, monkeypatch):
    with pytest.raises(KTConfigError, match="unknown value 'int3', expected int8 or int4"):
        quantize_model(files[1], tmp_path / "o", "int3")
    with pytest.raises(KTPathError, match="is not a directory with safetensors files"):
        quantize_model(tmp_path, tmp_path / "o")
    with pytest.raises(KTConfigError, match="AMXINT8 needs weight_path"):
        load(files[1], backend="AMXINT8")
    with pytest.raises(KTConfigError, match="weight_path is for AMXINT8 and AMXINT4, not for backend AMXBF16"):
        load(files[1], backend="AMXBF16", weight_path=str(files[0] / "int8"))
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("", (), {"free": 1000})())
    with pytest.raises(KTModelError, match=r"needs .* and 1\.0 KiB are free there"):
        quantize_model(files[1], tmp_path / "o")
    assert not (tmp_path / "o").exists()


def test_command(files, tmp_path):
    words = ["--model", files[1], "--output", tmp_path / "o", "--method", "int4"]
    result = subprocess.run(
        [sys.executable, "-m", "llamafactory_kt", "quantize", *words], capture_output=True, text=True
    )
    assert result.returncode == 0 and "2 layers packed as AMXINT4" in result.stdout, result.stderr
    result = subprocess.run(
        [sys.executable, "-m", "llamafactory_kt", "quantize", *words], capture_output=True, text=True
    )
    assert result.returncode == 0 and "0 layers packed as AMXINT4, 2 were there already" in result.stdout
