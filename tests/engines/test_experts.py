"""The engines, one layer at a time, against a plain float32 sum; and the life of a kernel object."""

from __future__ import annotations

import copy
import gc
import threading

import pytest
import torch
from conftest import ENGINES, needs_bfloat16_kernels, needs_kernel, needs_onednn, pretend_no_bfloat16_kernels
from tiny import make_adapter, make_model, merged_float32, rel
from transformers import AutoModelForCausalLM

from llamafactory_kt import KTAdapterError, KTExpertsConfig, apply_adapter, load_moe_lora_from_adapter, machine
from llamafactory_kt.adapters import ExpertLora, ExpertsShape
from llamafactory_kt.checkpoint.reader import ExpertWeights, LayerWeights
from llamafactory_kt.engines.base import EngineSpec
from llamafactory_kt.engines.ktkernel.engine import KTEngine
from llamafactory_kt.engines.ktkernel.methods import METHODS
from llamafactory_kt.engines.onednn.engine import OneDNNEngine
from llamafactory_kt.engines.reference import TorchEngine
from llamafactory_kt.matmul.layouts import is_packed, unpack
from llamafactory_kt.matmul.openmp import in_team
from llamafactory_kt.model import columns, onednn_engine, products, side_by_side

TOP_K = 3


def layer(shape: ExpertsShape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    e, h, i = shape.num_experts, shape.hidden_size, shape.intermediate_size

    def random(*size):
        return (torch.randn(*size, generator=generator) * size[-1] ** -0.5).to(torch.bfloat16)

    return LayerWeights(random(e, i, h), random(e, i, h), random(e, h, i))


def lora_for(shape: ExpertsShape, rank: int, scaling: float, seed=1) -> ExpertLora:
    generator = torch.Generator().manual_seed(seed)
    a, b, factors = {}, {}, {}
    for projection in ("gate", "up", "down"):
        out, size = shape.projection(projection)
        a[projection] = (torch.randn(shape.num_experts, rank, size, generator=generator) * size**-0.5).bfloat16()
        b[projection] = (torch.randn(shape.num_experts, out, rank, generator=generator) * rank**-0.5).bfloat16()
        factors[projection] = torch.full((shape.num_experts, rank), scaling, dtype=torch.float64)
    return ExpertLora(0, a, b, factors)


def reference(weights: LayerWeights, lora: ExpertLora | None, x, index, scores):
    """sum_k score * down(silu(gate x) * up x), token by token in float64."""
    full = {"gate": weights.gate.double(), "up": weights.up.double(), "down": weights.down.double()}
    if lora is not None:
        for p in full:
            full[p] = full[p] + (lora.b[p].double() * lora.scaling[p][:, None]) @ lora.a[p].double()
    out = torch.zeros_like(x, dtype=torch.float64)
    for token, row in enumerate(x.double()):
        for expert, score in zip(index[token].tolist(), scores[token].double(), strict=True):
            gate = full["gate"][expert] @ row
            out[token] += score * (full["down"][expert] @ (gate * torch.sigmoid(gate) * (full["up"][expert] @ row)))
    return out


def make_engine(kind: str, shape: ExpertsShape, weights: LayerWeights, *, rank=8, scaling=1.0, chunk=16):
    def read(dtype):
        for expert in map(ExpertWeights, weights.gate, weights.up, weights.down):
            given = ExpertWeights(*(matrix.clone() for matrix in expert))
            yield given
            for matrix in given:
                matrix.fill_(torch.nan)  # as a mapped file's pages, which are gone when the next expert is read

    spec = EngineSpec(0, shape, TOP_K, rank, scaling)
    plain = {"torch": TorchEngine, "oneDNN": OneDNNEngine}
    engine = (
        plain[kind](spec, read)
        if kind in plain
        else KTEngine(spec, read, METHODS[kind], max_chunk=chunk, pools=1, verbose=False)
    )
    engine.load()
    return engine


def batch(shape: ExpertsShape, tokens: int, seed=2):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, shape.hidden_size, generator=generator).bfloat16()
    index = torch.stack([torch.randperm(shape.num_experts, generator=generator)[:TOP_K] for _ in range(tokens)])
    return x, index, torch.rand(tokens, TOP_K, generator=generator)


@needs_onednn
@pytest.mark.parametrize(
    "packed", [set(), *(pytest.param({size}, marks=needs_bfloat16_kernels) for size in [(14, 33), (33, 7)])], ids=str
)
def test_onednn_with_weights_that_are_not_packed(monkeypatch, packed):
    monkeypatch.setattr(onednn_engine, "faster_packed", lambda sizes, sample: packed & set(sizes))
    shape = ExpertsShape(4, 33, 7)
    weights, lora, given = layer(shape), lora_for(shape, rank=5, scaling=3.2), batch(shape, 37)
    engine = make_engine("oneDNN", shape, weights)
    assert rel(engine.forward(*given), reference(weights, None, *given)) < 0.01
    engine.set_lora(lora)
    assert rel(engine.forward(*given), reference(weights, lora, *given)) < 0.01
    assert {tuple(w.shape) for pair in engine._weights for w in pair if is_packed(w)} == packed


@needs_onednn
@pytest.mark.parametrize("packed", [set(), {(32, 48)}, {(48, 16)}], ids=str)
def test_onednn_without_bfloat16_kernels(monkeypatch, packed):
    """Experts with few rows, and with many, plain or in columns."""
    pretend_no_bfloat16_kernels(monkeypatch)
    monkeypatch.setattr(onednn_engine, "faster_packed", lambda sizes, sample: packed & set(sizes))
    monkeypatch.setattr(columns, "WIDTH", 16)
    shape = ExpertsShape(7, 48, 16)
    weights, lora, (x, index, scores) = layer(shape), lora_for(shape, rank=5, scaling=3.2), batch(shape, 37)
    index[index == 6] = 2
    index[:30, 0], index[:3, 1] = 3, 6
    rows = torch.bincount(index.flatten(), minlength=7)
    assert min(rows) < products.FEW_ROWS < max(rows)
    engine = make_engine("oneDNN", shape, weights)
    assert {tuple(unpack(w).shape) for pair in engine._weights for w in pair if is_packed(w)} == packed
    assert rel(engine.forward(x, index, scores), reference(weights, None, x, index, scores)) < 0.01
    engine.set_lora(lora)
    assert rel(engine.forward(x, index, scores), reference(weights, lora, x, index, scores)) < 0.01


@needs_onednn
@pytest.mark.parametrize("block", [1, 5 * 48, 2**20])
def test_blocks_that_do_not_divide_a_weight(block):
    x, weight, bias = torch.randn(2, 9, 48), torch.randn(32, 48).bfloat16(), torch.randn(32).bfloat16()
    found = products._in_blocks(x, weight, bias, block)
    torch.testing.assert_close(found.double(), x.double() @ weight.double().T + bias.double(), rtol=1e-5, atol=1e-5)


@needs_onednn
@pytest.mark.parametrize("packed", [True, False])
def test_onednn_without_bfloat16_kernels_rounds_nothing_between_products(monkeypatch, packed):
    """Where every expert has many rows, and the caller takes float32."""
    pretend_no_bfloat16_kernels(monkeypatch)
    monkeypatch.setattr(columns, "WIDTH", 16)
    monkeypatch.setattr(onednn_engine, "faster_packed", lambda sizes, sample: {size for size in sizes if packed})
    shape = ExpertsShape(3, 48, 8)
    weights, lora, (x, index, scores) = layer(shape), lora_for(shape, rank=5, scaling=3.2), batch(shape, 37)
    assert torch.bincount(index.flatten(), minlength=3).min() >= products.FEW_ROWS
    engine = make_engine("oneDNN", shape, weights)
    for one in (None, lora):
        engine.set_lora(one)
        assert rel(engine.forward(x.float(), index, scores), reference(weights, one, x, index, scores)) < 1e-5


@pytest.fixture
def two_threads():
    """Tests beside each other have one each."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@needs_onednn
@pytest.mark.parametrize("kernels", [pytest.param(True, marks=needs_bfloat16_kernels), False])
@pytest.mark.parametrize("kept", [1, 30, 10**6])
@pytest.mark.parametrize("alone", [True, False])
def test_onednn_computes_experts_side_by_side(monkeypatch, two_threads, alone, kept, kernels):
    """By threads of their own or all together; their results added up expert by expert, some at a time, and all at once."""
    if not kernels:
        pretend_no_bfloat16_kernels(monkeypatch)
    shape = ExpertsShape(7, 33, 8)
    monkeypatch.setattr(onednn_engine, "RESULTS", kept * 4 * shape.hidden_size)
    monkeypatch.setattr(side_by_side, "FEWEST_ROWS", 7)
    monkeypatch.setattr(side_by_side, "_BUSY", 0.0 if alone else 2.0)
    weights, lora, (x, index, scores) = layer(shape), lora_for(shape, rank=5, scaling=3.2), batch(shape, 37)
    index[:30, 0] = 3  # most tokens choose this expert (some of them twice), and none the last one
    index[index == 6] = 2
    teams = []
    monkeypatch.setattr(side_by_side, "in_team", lambda *given: teams.append(given) or in_team(*given))
    engine = make_engine("oneDNN", shape, weights)
    assert rel(engine.forward(x, index, scores), reference(weights, None, x, index, scores)) < 0.01
    engine.set_lora(lora)
    assert rel(engine.forward(x, index, scores), reference(weights, lora, x, index, scores)) < 0.01
    assert bool(teams) == alone


@pytest.fixture(autouse=True, scope="module")
def worker_threads():
    from llamafactory_kt.engines.ktkernel.cpuinfer import settle_pool

    settle_pool(1, 1)


@pytest.mark.parametrize("kind", ENGINES)
@pytest.mark.parametrize("shape", [ExpertsShape(5, 64, 96), ExpertsShape(6, 72, 40), ExpertsShape(4, 33, 7)], ids=str)
@pytest.mark.parametrize("tokens", [1, 16, 37])
def test_base_and_lora_against_float64(kind, shape, tokens):
    """Sizes the kernel takes and sizes it would crash on; fewer, exactly and more tokens than a chunk."""
    weights, lora = layer(shape), lora_for(shape, rank=5, scaling=3.2)
    engine = make_engine(kind, shape, weights, rank=5, scaling=3.2)
    x, index, scores = batch(shape, tokens)
    wanted = reference(weights, None, x, index, scores), reference(weights, lora, x, index, scores)
    base = engine.forward(x, index, scores)
    engine.set_lora(lora)
    whole = engine.forward(x, index, scores)
    assert base.shape == x.shape and base.dtype == x.dtype
    assert rel(base, wanted[0]) < 0.01
    assert rel(whole, wanted[1]) < 0.01
    assert rel(whole.double() - base.double(), wanted[1] - wanted[0]) < 0.015
    assert rel(wanted[1], wanted[0]) > 0.5


@pytest.mark.parametrize("kind", ENGINES)
def test_another_lora_of_any_rank_and_back_to_the_base(kind):
    shape = ExpertsShape(5, 64, 96)
    weights = layer(shape)
    engine = make_engine(kind, shape, weights, rank=8, scaling=2.0)
    x, index, scores = batch(shape, 20)
    for seed, (rank, scaling) in enumerate([(8, 2.0), (1, 16.0), (3, 1.7), (64, 0.5), (2, 2.0)]):
        lora = lora_for(shape, rank, scaling, seed)
        engine.set_lora(lora)
        assert rel(engine.forward(x, index, scores), reference(weights, lora, x, index, scores)) < 0.01, (rank, scaling)
    engine.set_lora(None)
    fresh = make_engine(kind, shape, weights)
    assert torch.equal(engine.forward(x, index, scores), fresh.forward(x, index, scores)), (
        "the old LoRA must be gone, exactly"
    )


@needs_kernel
def test_threads_take_turns_in_the_kernel():
    shape = ExpertsShape(5, 64, 96)
    engine = make_engine("AMXBF16", shape, layer(shape))
    cases = [batch(shape, 8, seed) for seed in range(8)]
    wanted = [engine.forward(*case) for case in cases]
    found = [[] for _ in cases]

    def work(number):
        for _ in range(50):
            found[number].append(engine.forward(*cases[number]))

    threads = [threading.Thread(target=work, args=(n,)) for n in range(len(cases))]
    [t.start() for t in threads]
    [t.join() for t in threads]
    assert all(torch.equal(out, wanted[n]) for n in range(len(cases)) for out in found[n])


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    root = tmp_path_factory.mktemp("files")
    model = make_model(root / "model", "deepseek_v2")
    return model, make_adapter(root / "a", model, rank=4), make_adapter(root / "b", model, rank=12, seed=7, naming="A")


def load(model, **keys):
    backend = keys.pop("backend", "auto")
    return AutoModelForCausalLM.from_pretrained(
        model, dtype=torch.bfloat16, quantization_config=KTExpertsConfig(backend=backend, **keys)
    )


@torch.inference_mode()
def answer(model):
    return model(input_ids=torch.arange(2, 40)[None]).logits


@needs_kernel
def test_pointers_survive_what_users_do_to_a_model(files):
    path, adapter, _ = files
    model, _ = apply_adapter(load(path, adapter=str(adapter)), adapter)
    before = answer(model)
    model.to("cpu").eval().requires_grad_(False)
    other, _ = apply_adapter(load(path), adapter)
    assert torch.equal(answer(other), before)
    del other
    gc.collect()
    junk = [torch.randn(64, 96) for _ in range(1000)]  # what would overwrite freed memory
    assert torch.equal(answer(model), before) and junk
    assert not list(load(path)._kt_wrappers[0].parameters())
    with pytest.raises(TypeError, match="cannot be copied"):
        copy.deepcopy(model)


@needs_kernel
def test_models_of_different_sizes_in_one_process(files, tmp_path):
    path, _, _ = files
    small = load(path)
    before = answer(small)
    large = load(make_model(tmp_path / "large", "qwen3_moe", hidden_size=160, num_experts=9, num_experts_per_tok=5))
    answer(large)
    assert torch.equal(answer(small), before)


def test_load_moe_lora_from_adapter_on_plain_and_wrapped_models(files):
    """Called again with another adapter, the old one is gone; a broken one changes nothing."""
    path, first, second = files
    plain = load(path, backend="torch")
    report = load_moe_lora_from_adapter(plain, first)
    assert report.layers == (1, 2) and report.experts == 2 * 6 * 3 * 2 and report.max_rank == 4
    experts_only = answer(plain)
    assert rel(experts_only, answer(merged_experts_only(path, first))) < 0.05
    load_moe_lora_from_adapter(plain, second)
    load_moe_lora_from_adapter(plain, first)
    assert torch.equal(answer(plain), experts_only)
    wrapped, _ = apply_adapter(load(path, backend="torch"), second)
    load_moe_lora_from_adapter(wrapped, first)
    with pytest.raises(KTAdapterError):
        load_moe_lora_from_adapter(wrapped, make_broken(first))
    assert [w.engine.lora_rank for w in wrapped._kt_wrappers] == [4, 4]


def merged_experts_only(path, adapter):
    import json
    import tempfile
    from pathlib import Path

    from safetensors.torch import load_file, save_file

    with tempfile.TemporaryDirectory() as folder:
        tensors = load_file(adapter / "adapter_model.safetensors")
        save_file({n: t for n, t in tensors.items() if ".experts." in n}, Path(folder) / "adapter_model.safetensors")
        (Path(folder) / "adapter_config.json").write_text(
            json.dumps(json.loads((adapter / "adapter_config.json").read_text()))
        )
        return merged_float32(path, Path(folder))


def make_broken(adapter):
    import shutil
    import tempfile
    from pathlib import Path

    from tiny import edit_adapter

    copy_of = Path(tempfile.mkdtemp()) / "broken"
    shutil.copytree(adapter, copy_of)

    def spoil(tensors):
        last = sorted(n for n in tensors if ".layers.2.mlp.experts." in n)[-1]
        tensors[last][0, 0] = float("nan")
        return tensors

    return edit_adapter(copy_of, spoil)


def test_not_enough_memory_is_said_before_reading(files, monkeypatch):
    from llamafactory_kt import KTMemoryError
    from llamafactory_kt.model import quantizer

    monkeypatch.setattr(quantizer, "available_memory", lambda: 100_000)
    with pytest.raises(KTMemoryError, match=r"The experts of 2 layers need .* are free"):
        load(files[0], backend="torch")
    assert machine.available_memory() > 100_000


def test_generation_is_inference_only(files):
    model = load(files[0], backend="torch")
    model.get_input_embeddings().weight.requires_grad_(True)
    with pytest.raises(RuntimeError, match="for inference"):
        model(input_ids=torch.arange(2, 10)[None])
