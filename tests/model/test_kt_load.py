"""``kt_load``: weights that stay in the checkpoint's mapped files, and weights that are copied."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from helpers.adapters import make_adapter
from helpers.architectures import tiny_model
from helpers.fp8 import make_fp8
from helpers.loading import load, logits
from helpers.marks import needs_native
from helpers.models import make_model
from helpers.packed import mxfp4, save_both
from helpers.references import per_token
from safetensors.torch import load_file

from llamafactory_kt import KTConfigError, KTMemoryError, apply_adapter, optimize_for_inference
from llamafactory_kt.engines.plan import Plan
from llamafactory_kt.load_report import load_rows
from llamafactory_kt.model import load_plan, memory
from llamafactory_kt.model.state import kt_state
from llamafactory_kt.native.packed import PackedWeight

pytestmark = needs_native
SIZES = {"hidden_size": 256, "moe_intermediate_size": 512, "num_experts": 16, "num_hidden_layers": 3}
EXPERTS = 16 * 3 * 3 * 256 * 512 * 2
"""bytes"""


@pytest.fixture(scope="module", params=["each expert", "fused"])
def path(request, tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("load") / "model"
    return make_model(directory, "qwen3_moe", save_original_format=request.param == "each expert", **SIZES)


def mapped_from(path: Path, model) -> set[bool]:
    """Whether the experts' weights lie where the model's files are mapped."""
    places = [
        (int(start, 16), int(end, 16))
        for start, end, name in re.findall(
            r"^(\w+)-(\w+) .* (/\S+)$", Path("/proc/self/maps").read_text(), re.MULTILINE
        )
        if name.startswith(str(path.resolve()))
    ]
    weights = [
        matrix.codes if isinstance(matrix, PackedWeight) else matrix
        for experts in kt_state(model).wrappers for expert in experts.engine._weights for matrix in expert
    ]  # fmt: skip
    return {any(start <= matrix.data_ptr() < end for start, end in places) for matrix in weights}


def own_memory() -> int:
    """Bytes of this process that are no file's."""
    return int(re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024


def test_where_weights_lie(path):
    before = own_memory()
    mapped = load(path, "native", load="mmap")
    optimize_for_inference(mapped)
    assert own_memory() - before < EXPERTS / 2
    assert mapped_from(path, mapped) == {True} and kt_state(mapped).options.mapped
    before = own_memory()
    copied = load(path, "native", load="copy")
    optimize_for_inference(copied)
    assert own_memory() - before > EXPERTS * 0.9
    assert mapped_from(path, copied) == {False} and not kt_state(copied).options.mapped
    assert mapped_from(path, load(path, "native")) == {False}, "auto, with memory to spare"
    assert torch.equal(logits(mapped), logits(copied))
    assert {experts.engine.nbytes for m in (mapped, copied) for experts in kt_state(m).wrappers} == {EXPERTS // 3}


def test_an_adapter_beside_mapped_weights(path, tmp_path):
    adapter = make_adapter(tmp_path / "adapter", path, rank=5, alpha=10)
    mapped, copied = (
        apply_adapter(load(path, "native", load=how, adapter=str(adapter)), adapter)[0] for how in ("mmap", "copy")
    )
    assert mapped_from(path, mapped.get_base_model()) == {True} and torch.equal(logits(mapped), logits(copied))


def test_little_memory(path, monkeypatch):
    """auto leaves what it cannot copy; what must be copied is refused before anything is read."""
    monkeypatch.setattr(memory, "available_memory", lambda: EXPERTS // 2)
    assert mapped_from(path, load(path, "native")) == mapped_from(path, load(path, "native", load="mmap")) == {True}
    for keys in ({"backend": "native", "load": "copy"}, {"backend": "torch"}, {"backend": "torch", "load": "mmap"}):
        with pytest.raises(
            KTMemoryError,
            match=r"The experts of 3 layers need .* are free\. Free memory, .*; or set kt_backend: native and kt_load: mmap",
        ):
            load(path, **keys)


def test_auto_takes_an_engine_for_which_there_is_memory(path, monkeypatch):
    monkeypatch.setattr(memory, "available_memory", lambda: EXPERTS // 2)
    monkeypatch.setattr(load_plan, "candidates", lambda *_, **__: [Plan("torch", 0, 1), Plan("native", 0, 1)])
    model = load(path, "auto")
    assert mapped_from(path, model) == {True}
    assert "no memory for torch, which would copy the weights" in kt_state(model).reason
    monkeypatch.setattr(memory, "available_memory", lambda: 100 * EXPERTS)
    assert "no memory" not in kt_state(load(path, "auto")).reason
    monkeypatch.setattr(memory, "available_memory", lambda: EXPERTS // 2)
    with pytest.raises(KTMemoryError, match="kt_load: mmap, which reads the weights from the files, slowly"):
        load(path, "auto", load="copy")


def test_auto_leaves_room_for_a_conversation(path, monkeypatch):
    needs = []
    stock = memory.memory_need
    monkeypatch.setattr(memory, "memory_need", lambda *given, **keys: needs.append(stock(*given, **keys)) or needs[-1])
    load(path, "native")
    monkeypatch.setattr(memory, "available_memory", lambda: int(needs[0].on_cpu * 1.05))
    assert mapped_from(path, load(path, "native")) == {True}
    assert mapped_from(path, load(path, "native", load="copy")) == {False}


def transposed(directory: Path) -> Path:
    torch.manual_seed(0)
    tiny_model("gpt_oss").to(torch.bfloat16).save_pretrained(directory / "model")
    return directory / "model"


def quantized(directory: Path) -> Path:
    source = make_model(directory / "source", "qwen3_moe", dtype=torch.float32)
    return make_fp8(directory / "model", source, [24, 16])[0]


@pytest.mark.parametrize(
    ("make", "keys", "reason"),
    [
        (transposed, {}, "they are stored in another layout or dtype"),
        (quantized, {}, "they are stored in another layout or dtype"),
        (None, {"merge_adapter": True}, "the adapter is merged into them"),
        (None, {"backend": "torch"}, "torch keeps them in a layout of its own"),
    ],
    ids=["transposed", "quantized", "merged", "another engine"],
)
def test_what_cannot_be_mapped_is_copied(tmp_path, make, keys, reason, kt_log):
    path = make(tmp_path) if make else make_model(tmp_path / "model", "qwen3_moe")
    keys = {"backend": "native", **keys}
    if "merge_adapter" in keys:
        keys["adapter"] = str(make_adapter(tmp_path / "adapter", path))
    wanted = logits(load(path, **keys))
    assert "kt_load" not in kt_log.text, "nobody asked"
    found = load(path, load="mmap", **keys)
    assert f"kt_load: mmap: the experts' weights are copied, because {reason}" in kt_log.text
    assert mapped_from(path, found) == {False} and torch.equal(logits(found), wanted)


def mxfp4_experts(directory: Path) -> Path:
    torch.manual_seed(0)
    tiny_model("gpt_oss", hidden_size=256, intermediate_size=512).to(torch.bfloat16).save_pretrained(
        directory / "model"
    )
    stored = load_file(directory / "model" / "model.safetensors")
    for name in [name for name in stored if name.endswith(("gate_up_proj", "down_proj"))]:
        blocks, scales, _ = mxfp4(stored.pop(name).transpose(1, 2).float())
        stored |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
    return save_both(directory, directory / "model", stored, {}, {"quant_method": "mxfp4"})[0]


def fp8_experts(directory: Path) -> Path:
    return make_fp8(directory, make_model(directory / "source", "qwen3_moe", dtype=torch.float32, **SIZES), [128, 128])[
        0
    ]


@pytest.mark.parametrize(("make", "kind"), [(mxfp4_experts, "MXFP4"), (fp8_experts, "F8_E4M3")])
def test_quantized_weights_stay_where_they_are(tmp_path, make, kind, monkeypatch):
    """And the load's estimate is what they take: mapped, only the scales that must be converted."""
    path, needs, stock = make(tmp_path), [], memory.memory_need
    monkeypatch.setattr(memory, "memory_need", lambda *given, **keys: needs.append(stock(*given, **keys)) or needs[-1])
    mapped, copied = (load(path, "native", load=how) for how in ("mmap", "copy"))
    assert (mapped_from(path, mapped), mapped_from(path, copied)) == ({True}, {False})
    assert torch.equal(logits(mapped), logits(copied))
    matrices = [m for experts in kt_state(copied).wrappers for expert in experts.engine._weights for m in expert]
    scales = sum(matrix.scales.nbytes for matrix in matrices)
    assert needs[0].experts == (scales if kind == "MXFP4" else 0)
    assert needs[1].experts == scales + sum(matrix.codes.nbytes for matrix in matrices)
    rows = dict(load_rows(mapped))
    assert rows["Weights"] == f"{kind} as the checkpoint has them, mapped from the checkpoint's files"
    monkeypatch.setattr(load_plan, "candidates", lambda *_, **__: [Plan("torch", 0, 1), Plan("native", 0, 1)])
    chosen = load(path, "auto")
    assert kt_state(chosen).plan.backend == "native" and "torch would decode the weights" in kt_state(chosen).reason
    monkeypatch.undo()
    monkeypatch.setattr(memory, "memory_need", lambda *given, **keys: needs.append(stock(*given, **keys)) or needs[-1])
    decoded = load(path, "torch")
    assert needs[-1].experts > 1.7 * needs[1].experts and per_token(logits(copied), logits(decoded)) < 0.02


def test_a_value_that_is_none(path):
    with pytest.raises(
        KTConfigError, match=r"^load: unknown value 'mmaps', expected one of auto, mmap, copy; did you mean mmap\?"
    ):
        load(path, "native", load="mmaps")
