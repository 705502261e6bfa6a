"""Models whose experts are read from packed files, and packed files that are wrong."""

from __future__ import annotations

import json

import pytest
import torch
from helpers.loading import answer, load
from helpers.marks import needs_kernel
from helpers.quantized import quantized_model
from helpers.references import merged_float32, per_token

from llamafactory_kt import KTModelError, KTPathError, apply_adapter, switch_adapter
from llamafactory_kt.engines.ktkernel.packed_files import LayerRecord
from llamafactory_kt.engines.weight_files import read_record
from llamafactory_kt.model.state import kt_state

pytestmark = [needs_kernel, pytest.mark.usefixtures("worker_threads")]


# Errors on random weights, which have no outliers and no structure; LoRA is bf16 in all of them.
BOUNDS = {"AMXINT8": 0.03, "AMXINT4": 0.25}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return quantized_model(tmp_path_factory.mktemp("packed"))


@pytest.mark.parametrize("method", BOUNDS)
def test_a_model_on_packed_weights(files, method):
    """The same as from the checkpoint; with an adapter, close to the float32 model; and a second load uses the files
    again."""
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
    assert kt_state(model).wrappers[0].engine.nbytes < 0.6 * 3 * 6 * 128 * 128 * 2
    switch_adapter(model, None)
    assert torch.equal(answer(model), base)
    del model
    assert torch.equal(answer(load(path, **keys)), base), "the same kernel objects"


@pytest.fixture
def packed(files, tmp_path):
    """A copy of the INT8 weights to spoil."""
    import shutil

    return shutil.copytree(files[0] / "int8", tmp_path / "packed")


def first_file(packed):
    return packed / "_layer_1" / sorted(read_record(packed / "_layer_1", LayerRecord)[1])[0]


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
        (record(method="AMXINT4"), KTModelError, r"was made with method AMXINT4, wanted AMXINT8\. Quantize"),
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
    """They have no record, so only their names and sizes are checked."""
    for path in packed.glob("_layer_*/layer.json"):
        path.unlink()
    wanted = answer(load(files[1], backend="AMXINT8", weight_path=str(files[0] / "int8")))
    assert torch.equal(answer(load(files[1], backend="AMXINT8", weight_path=str(packed))), wanted)
    assert "only the sizes of its files are checked" in kt_log.text
    next(packed.glob("_layer_1/_numa_0/INT8_up_3_*_scale_.kt")).write_bytes(b"")
    with pytest.raises(KTModelError, match="1 of 36 files are missing, truncated"):
        load(files[1], backend="AMXINT8", weight_path=str(packed))
