"""``kt_gpu_experts``: some experts on the device that a layer's tokens are on, the others in the engine. The device is the CPU here, so that
the tests run everywhere; ``tests/gpu`` has a GPU's."""

from __future__ import annotations

import itertools
import json
import threading

import numpy as np
import pytest
import torch
from helpers.adapters import make_adapter
from helpers.architectures import tiny_model
from helpers.chats import chat_model
from helpers.experts import TOP_K, batch, lora_for, make_engine, reference
from helpers.experts import layer as expert_weights
from helpers.loading import load, logits
from helpers.marks import needs_kernel, needs_native, needs_onednn
from helpers.models import make_model
from helpers.references import merged_float32, per_token, rel
from helpers.streams import LateStream

from llamafactory_kt import (
    KTConfigError,
    KTDataError,
    KTKernelError,
    KTMemoryError,
    KTPathError,
    apply_adapter,
    choose_adapter,
    get_router_stats,
    load_moe_lora_from_adapter,
    optimize_for_inference,
    switch_adapter,
)
from llamafactory_kt.adapters import ExpertsShape
from llamafactory_kt.adapters.keys import PROJECTIONS
from llamafactory_kt.checkpoint.expert_weights import ExpertBiases, ExpertWeights
from llamafactory_kt.checkpoint.formula import ExpertFormula
from llamafactory_kt.checkpoint.layout import Stored
from llamafactory_kt.engines import gpus
from llamafactory_kt.engines.options import EngineSpec
from llamafactory_kt.engines.reference import ReferenceEngine
from llamafactory_kt.engines.registry import get_engine
from llamafactory_kt.integration.model.loader import in_dtype
from llamafactory_kt.load_report import load_rows
from llamafactory_kt.model.on_gpu import placement
from llamafactory_kt.model.on_gpu.placement import GpuNeed, expert_itemsize
from llamafactory_kt.model.on_gpu.split_experts import SplitExperts
from llamafactory_kt.model.on_gpu.transfer import HostTransfer
from llamafactory_kt.model.on_gpu.usage import Usage
from llamafactory_kt.model.state import kt_state
from llamafactory_kt.tools.experiments.usage import ExpertUsage
from llamafactory_kt.tools.verify import record_inputs, verify_layers
from llamafactory_kt.tools.verify.reference import Reference

CPU = torch.device("cpu")
SHAPE = ExpertsShape(5, 64, 40)
ENGINES = [
    "torch", pytest.param("native", marks=needs_native), pytest.param("oneDNN", marks=needs_onednn),
    pytest.param("INT8", marks=needs_native), pytest.param("INT4", marks=needs_native),
]  # fmt: skip
IDS = torch.arange(2, 40)[None]


@pytest.fixture
def the_cpu_as_gpu(monkeypatch):
    monkeypatch.setattr(gpus, "visible", lambda: [CPU])
    monkeypatch.setattr(gpus, "free_memory", lambda device: 2**40)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A model, an adapter of rank 5, and one of rank 3 without layer 1."""
    root = tmp_path_factory.mktemp("gpu_experts")
    model = make_model(root / "model", "qwen3_moe")
    return (
        model,
        make_adapter(root / "one", model, rank=5),
        make_adapter(root / "two", model, rank=3, skip_layers=(1,), seed=2),
    )


@pytest.fixture(scope="module")
def merged(files):
    """The logits of stock transformers in float32 with an adapter merged; None for the base model."""
    path, one, two = files
    return {adapter: logits(merged_float32(path, adapter)) for adapter in (None, one, two)}


def split_of(engine, count, dtype=torch.bfloat16):
    return SplitExperts(engine, count, CPU, dtype, Usage(np.zeros(engine.spec.shape.num_experts, np.int64)))


# ---- one layer ----


@pytest.mark.parametrize("tokens", [1, 9])
@pytest.mark.parametrize("kind", ENGINES)
def test_the_sum_is_that_of_all_experts(kind, tokens):
    """Whichever experts are on the device: none of a token's, some and all. Float tokens, so that only the products are rounded."""
    weights, lora = expert_weights(SHAPE), lora_for(SHAPE, 3, 1.5)
    engine = make_engine(kind, SHAPE, weights)
    x, index, scores = batch(SHAPE, tokens)
    x = x.float()
    wanted = [engine.forward(x, index, scores)]
    engine.set_lora(lora)
    wanted.append(engine.forward(x, index, scores))
    engine.set_lora(None)
    bound = 1e-6 if kind == "torch" else 0.01
    if kind == "torch":
        assert rel(wanted[1], reference(weights, lora, x, index, scores)) < 1e-6
    for count in range(1, 6):
        split = split_of(engine, count, torch.bfloat16)
        for experts in itertools.islice(itertools.combinations(range(5), count), 0, None, 2):
            split.place(experts)
            assert rel(split.forward(x, index, scores), wanted[0]) < bound, experts
            undo = split.set_lora(lora)
            found = split.forward(x, index, scores)
            assert rel(found, wanted[1]) < bound, experts
            effect = found - split.engine.forward(x, index, scores)
            assert torch.isfinite(effect).all()
            undo()
            assert rel(split.forward(x, index, scores), wanted[0]) < bound, experts
    assert rel(wanted[1], wanted[0]) > 0.3


@pytest.mark.parametrize("kind", ENGINES)
def test_an_engine_leaves_out_what_is_computed_elsewhere(kind):
    engine = make_engine(kind, SHAPE, expert_weights(SHAPE))
    engine.set_lora(lora_for(SHAPE, 3, 1.5))
    x, index, scores = batch(SHAPE, 40)
    x = x.float()
    marked = index.clone()
    marked[index == 1], marked[index == 4] = ~1, ~4
    marked[7] = ~index[7]
    kept = scores * (marked >= 0)
    assert 0 < int((marked < 0).sum()) < marked.numel()
    found = engine.forward(x, marked, scores)
    assert rel(found, engine.forward(x, index, kept)) < 1e-6 and not found[7].any()
    assert not engine.forward(x[:1], ~index[:1], scores[:1]).any()


@pytest.mark.parametrize(
    "formula",
    [
        ExpertFormula("gelu_tanh", limit=2.0),
        ExpertFormula("silu", alpha=1.702, limit=2.0, up_offset=1.0, has_biases=True),
        ExpertFormula("relu2", has_gate=False),
        ExpertFormula("silu", has_gate=False, has_biases=True),
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", ["torch", pytest.param("native", marks=needs_native)])
def test_every_formula_with_lora(kind, formula):
    shape = ExpertsShape(5, 64, 40, formula.has_gate)
    generator = torch.Generator().manual_seed(0)
    sizes = [shape.projection(projection) for projection in PROJECTIONS]
    weights = [(torch.randn(5, *size, generator=generator) / 8).bfloat16() for size in sizes]
    biases = (
        ExpertBiases(*(torch.randn(5, out, generator=generator) for out, _ in sizes)) if formula.has_biases else None
    )
    spec = EngineSpec(0, shape, TOP_K, 3, formula=formula, read_biases=lambda: biases)
    engine = get_engine(kind)(spec, lambda dtype: map(ExpertWeights, *weights))
    engine.load()
    engine.set_lora(lora_for(shape, 3, 0.5))
    x, index, scores = batch(shape, 9)
    x = x.float()
    wanted = engine.forward(x, index, scores)
    split = split_of(engine, 3, torch.float32)
    split.place([4, 0, 2])
    assert rel(split.forward(x, index, scores), wanted) < (1e-6 if kind == "torch" else 0.01)
    alone = split_of(engine, 5, torch.float32)
    assert rel(alone.forward(x[:1], index[:1], scores[:1]), wanted[:1]) < (1e-6 if kind == "torch" else 0.01)


def test_experts_that_stay_are_not_copied_again(monkeypatch):
    """Nor weights where LoRA is exchanged."""
    engine, read = make_engine("torch", SHAPE, expert_weights(SHAPE)), []
    split = split_of(engine, 3, torch.bfloat16)
    stock = engine.product
    monkeypatch.setattr(engine, "product", lambda name, expert: (read.append(expert), stock(name, expert))[1])
    split.place([2, 4, 0])
    assert set(read) == {4} and sorted(split.experts) == [0, 2, 4]
    weights = [stack.weight._version for stack in split._stacks.values()]
    split.set_lora(lora_for(SHAPE, 3, 1.5))
    assert weights == [stack.weight._version for stack in split._stacks.values()]


@pytest.mark.parametrize("kind", ["torch", pytest.param("INT4", marks=needs_native)])
def test_with_another_default_device(kind):
    engine = make_engine(kind, SHAPE, expert_weights(SHAPE))
    x, index, scores = batch(SHAPE, 9)
    wanted = engine.forward(x.float(), index, scores)
    with torch.device("meta"), torch.inference_mode():
        split = split_of(engine, 3)
        split.place([4, 0, 2])
    split.set_lora(lora_for(SHAPE, 3, 1.5))()
    assert rel(split.forward(x.float(), index, scores), wanted) < 0.01


def test_an_expert_that_cannot_be_read_stays_with_the_engine(monkeypatch):
    engine = make_engine("torch", SHAPE, expert_weights(SHAPE))
    x, index, scores = batch(SHAPE, 9)
    wanted = engine.forward(x.float(), index, scores)
    split = split_of(engine, 3, torch.bfloat16)
    stock = engine.product

    def product(name, expert):
        if (name, expert) == ("down", 4):
            raise OSError("the disk is gone")
        return stock(name, expert)

    monkeypatch.setattr(engine, "product", product)
    with pytest.raises(OSError, match="gone"):
        split.place([3, 4, 0])
    assert rel(split.forward(x.float(), index, scores), wanted) < 1e-6
    monkeypatch.undo()
    split.place([3, 4, 0])
    assert sorted(split.experts) == [0, 3, 4] and rel(split.forward(x.float(), index, scores), wanted) < 1e-6


def test_the_most_used():
    usage = Usage(np.zeros(5, np.int64))
    assert usage.most_used(3) == [0, 1, 2]
    usage.add(torch.tensor([[4, 2], [4, 1], [2, 4]]))
    assert usage.most_used(3) == [4, 2, 1] and usage.most_used(5) == [4, 2, 1, 0, 3] and usage.tokens == 3


class OnStream(ReferenceEngine):
    """The stream waits for it."""

    streams = captures = True

    def stream_dtype(self, dtype):
        return dtype

    def on_stream(self, stream, x, index, scores, out):
        class Block:
            def __enter__(block):
                stream.launch(lambda: out.copy_(self.forward(x, index, scores)))

            def __exit__(block, *error):
                stream.join()

        return Block()


@pytest.mark.parametrize("seen", [False, True])
@pytest.mark.parametrize("kind", [ReferenceEngine, OnStream])
def test_both_compute_at_the_same_time(kind, seen):
    """The way of a GPU's tokens: the engine is started first, then the device's experts are queued, then the engine is waited for."""
    weights = expert_weights(SHAPE)
    engine = kind(
        EngineSpec(0, SHAPE, TOP_K, 0), lambda dtype: map(ExpertWeights, weights.gate, weights.up, weights.down)
    )
    engine.load()
    split, stream, counted = split_of(engine, 2, torch.bfloat16), LateStream(behind=False), []
    split.place([3, 1])
    stock = split.compute
    split.compute = lambda *given: (stream.log.append("here"), stock(*given))[1]
    transfer = HostTransfer(stream)
    for tokens in (4, 1, 9):
        x, index, scores = batch(SHAPE, tokens, seed=tokens)
        wanted = engine.forward(x.float(), index, scores)
        stream.log.clear()
        found = transfer.forward(
            engine, (x.float(), index.int() if tokens == 9 else index, scores), lambda: stream.log.append("meanwhile"),
            (lambda *of: counted.append(of)) if seen else None, split,
        )  # fmt: skip
        assert rel(found, wanted) < 1e-6
        if seen:
            assert torch.equal(counted[-1][0], index) and torch.equal(counted[-1][1], scores)
    launched = kind is OnStream and not seen
    kept = [step for step in stream.log if step in ("launch", "meanwhile", "here", "join")]
    assert kept == (["launch", "meanwhile", "here", "join"] if launched else ["meanwhile", "here"])
    assert split.usage.tokens == 14


def test_the_wait_is_for_what_was_chosen():
    """Not for the work that was queued afterwards; numbers that have not crossed would be wrong ones."""
    weights = expert_weights(SHAPE)
    engine = OnStream(
        EngineSpec(0, SHAPE, TOP_K, 0), lambda dtype: map(ExpertWeights, weights.gate, weights.up, weights.down)
    )
    engine.load()
    split, stream, found = split_of(engine, 2, torch.bfloat16), LateStream(), []
    stock = split.compute
    split.compute = lambda x, marked, scores: (found.append(marked.clone()), stock(x, marked, scores))[1]
    transfer = HostTransfer(stream)
    transfer.forward(engine, batch(SHAPE, 9, seed=1), None, None, split)  # makes the buffers, for which it waits
    x, index, scores = batch(SHAPE, 9)
    stream.log.clear()
    transfer.forward(engine, (x, index, scores), lambda: stream.log.append("meanwhile"), None, split)
    assert stream.log == ["record", "launch", "meanwhile", "wait", "join"]
    assert torch.equal(found[1], torch.where(index < 2, ~index, index))
    stream.finish()
    stream.capturing = True
    with pytest.raises(RuntimeError, match="cannot be captured in a CUDA graph with kt_gpu_experts"):
        HostTransfer(stream).forward(engine, (x, index, scores), None, None, split)


# ---- a model ----


@pytest.mark.parametrize(
    ("kind", "count"), [("torch", 2), ("torch", "auto"), pytest.param("native", 4, marks=needs_native)]
)
def test_a_model_with_adapters(files, merged, the_cpu_as_gpu, kind, count):
    """Without LoRA, with it, its effect apart, after exchanges, and after experts were exchanged."""
    path, one, two = files
    bound = 2e-5 if kind == "torch" else 0.02
    choices = {"two": [str(two)], "none": []}
    model = load(path, kind, dtype=torch.float32, gpu_experts=count, adapter=str(one), choices=choices)
    splits = [wrapper.split for wrapper in kt_state(model).wrappers]
    assert [len(split.experts) for split in splits] == [6 if count == "auto" else count] * 3
    base = logits(model)
    assert per_token(base, merged[None]) < bound
    model, _ = apply_adapter(model, one)
    optimize_for_inference(model)
    for split in splits:
        split.place([*range(split.count)][::-1] if count == "auto" else [5, 3, 0, 4][:count])
    for adapter in (one, two, None, one):
        switch_adapter(model, adapter)
        found, wanted = logits(model), merged[adapter]
        assert per_token(found, wanted) < bound
        effect, theirs = found - base, wanted - merged[None]
        if adapter is not None:
            assert rel(wanted, merged[None]) > 0.2 and rel(effect, theirs) < 5 * bound
    names = {"two": two, "none": None, None: one}
    for number, name in enumerate(("two", None, "none", "two", None, "two", "none")):  # also after other experts came
        choose_adapter(model, name)
        assert per_token(logits(model), merged[names[name]]) < bound, (number, name)
        for split in splits:
            split.place([(number + expert) % 6 for expert in range(split.count)])
        assert per_token(logits(model), merged[names[name]]) < bound, (number, name)
    load_moe_lora_from_adapter(model, two)
    assert rel(logits(model), merged[one]) > 0.1


def test_the_most_used_are_exchanged_between_generations(files, the_cpu_as_gpu, monkeypatch, kt_log):
    """After so many tokens, and again when they are twice as many; never within a generation. Counts are those of the routers."""
    monkeypatch.setattr(placement, "FIRST", 40)
    model = load(files[0], "torch", dtype=torch.float32, gpu_experts=2, router_stats=True)
    plain = load(files[0], "torch", dtype=torch.float32)
    state, due, exchanges = kt_state(model), 40, 0
    splits = {wrapper.layer_idx: wrapper.split for wrapper in state.wrappers}
    expected = {layer: [0, 1] for layer in splits}
    assert dict(load_rows(model))["Experts on GPU"] == "2 of each of 3 layers, the first; after 40 tokens the most used"
    for number, length in enumerate((20, 25, 5, 60, 5)):
        stats = get_router_stats(model)
        if (tokens := stats[0].tokens) >= due:
            expected = {n: sorted((-stats[n].counts).argsort(kind="stable")[:2].tolist()) for n in splits}
            due, exchanges = 2 * tokens, exchanges + 1
        ids = IDS[:, number : number + 2]
        keys = {"max_new_tokens": length, "min_new_tokens": length, "do_sample": False, "pad_token_id": 1}
        keys["attention_mask"] = torch.ones_like(ids)
        assert torch.equal(model.generate(ids, **keys), plain.generate(ids, **keys))
        assert {layer: sorted(split.experts) for layer, split in splits.items()} == expected
        assert {split.usage.tokens for split in splits.values()} == {get_router_stats(model)[0].tokens}
    assert exchanges == 2 and any(experts != [0, 1] for experts in expected.values())
    assert "The GPU now has the 2 most used experts of each layer, of 47 tokens" in kt_log.text
    assert dict(load_rows(model))["Experts on GPU"] == f"2 of each of 3 layers, the most used of {tokens} tokens"


def test_statistics_choose_the_first(files, the_cpu_as_gpu, tmp_path):
    """Those that ``llamafactory-kt stats`` writes; the next choice comes when the tokens have doubled."""
    counted = load(files[0], "torch", router_stats=True)
    logits(counted)
    stats = get_router_stats(counted)
    usage = json.dumps(ExpertUsage(1, [], stats, {}, {}, 3).to_dict())
    (tmp_path / "stats.json").write_text(usage)
    for path in (tmp_path, tmp_path / "stats.json"):
        model = load(files[0], "torch", gpu_experts=2, gpu_experts_path=str(path))
        for wrapper in kt_state(model).wrappers:
            wanted = (-stats[wrapper.layer_idx].counts).argsort(kind="stable")[:2].tolist()
            assert wrapper.split.experts == wanted and wrapper.split.usage.tokens == 40
    assert dict(load_rows(model))["Experts on GPU"] == "2 of each of 3 layers, the most used of 40 tokens"
    for text, error, message in (
        (None, KTPathError, "does not exist"),
        (
            usage.replace('"layer": 2', '"layer": 3'),
            KTDataError,
            "counts the experts of another model: layers and experts",
        ),
        (
            usage.replace('"counts": [', '"counts": [-1, '),
            KTDataError,
            "is not the stats.json that llamafactory-kt stats writes",
        ),
        ("[]", KTDataError, "is not the stats.json that llamafactory-kt stats writes"),
        ("{", KTDataError, "is not the stats.json that llamafactory-kt stats writes"),
    ):
        file = tmp_path / "other.json"
        if text is not None:
            file.write_text(text)
        with pytest.raises(error, match=message):
            load(files[0], "torch", gpu_experts=2, gpu_experts_path=str(file))
        file.unlink(missing_ok=True)
    with pytest.raises(KTConfigError, match="gpu_experts_path needs gpu_experts: a number or auto"):
        load(files[0], "torch", gpu_experts_path=str(tmp_path))


def test_nothing_is_exchanged_while_another_generates(files, the_cpu_as_gpu):
    lock = kt_state(load(files[0], "torch", gpu_experts=2)).lock
    begun, ended = threading.Event(), threading.Event()

    def generate():
        with lock.generation():
            begun.set()
            ended.wait()

    thread = threading.Thread(target=generate)
    thread.start()
    begun.wait()
    refused = [lock.alone_if_idle(lambda: pytest.fail("a generation runs"))]
    ended.set()
    thread.join()
    with lock.generation():
        refused.append(lock.alone_if_idle(lambda: pytest.fail("this thread generates")))
    assert refused == [False, False] and lock.alone_if_idle(lambda: None)
    lock.alone(lambda: None)


def test_a_failing_exchange_changes_nothing(files, merged, the_cpu_as_gpu, monkeypatch):
    """The last layer's device has no memory for the new adapter."""
    path, one, two = files
    model, _ = apply_adapter(load(path, "torch", dtype=torch.float32, gpu_experts=3, adapter=str(one)), one)
    before, stock = logits(model), torch.empty
    last = kt_state(model).wrappers[-1].split

    def full(*size, **keys):
        if size[:1] == (3,) and keys.get("device") is last.device:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return stock(*size, **keys)

    last.device = torch.device("cpu")  # one that is told from the others'
    with monkeypatch.context() as patched:
        patched.setattr(torch, "empty", full)
        with pytest.raises(
            KTMemoryError,
            match=r"kt_gpu_experts: cpu has too little memory for 3 experts of layer 2 with a LoRA of rank 3",
        ):
            switch_adapter(model, two)
    assert torch.equal(logits(model), before) and per_token(before, merged[one]) < 2e-5
    switch_adapter(model, two)
    assert per_token(logits(model), merged[two]) < 2e-5


@needs_native
@pytest.mark.parametrize("kind", ["INT8", "INT4"])
def test_a_quantized_engine_answers_as_without(files, merged, the_cpu_as_gpu, kind):
    """Where an expert is computed changes no answer: the values are those of the engine's codes, and not the checkpoint's."""
    path, one, _ = files
    without, split = (
        apply_adapter(load(path, kind, dtype=torch.float32, gpu_experts=n, adapter=str(one)), one)[0] for n in (0, 3)
    )
    assert per_token(logits(split), logits(without)) < 0.01  # activations in bfloat16 there, and in float32 here
    assert kind == "INT8" or per_token(logits(without), merged[one]) > 0.1


def test_merged_experts(files, merged, the_cpu_as_gpu):
    path, one, _ = files
    model = load(path, "torch", dtype=torch.float32, gpu_experts=3, adapter=str(one), merge_adapter=True)
    assert per_token(logits(apply_adapter(model, one)[0]), merged[one]) < 0.01


@pytest.mark.parametrize("arch", ["deepseek_v2", "llama4_text"])
def test_shared_and_presorted_experts(tmp_path, the_cpu_as_gpu, arch):
    path = tmp_path / "model"
    if arch == "deepseek_v2":
        make_model(path, arch)
    else:
        tiny_model(arch).to(torch.bfloat16).save_pretrained(path)
    model, computed = load(path, "torch", dtype=torch.float32, gpu_experts=2), []
    for split in kt_state(model).placement.layers:
        split.compute = lambda *given, stock=split.compute: (computed.append(stock(*given)), computed[-1])[1]
    assert per_token(logits(model), logits(load(path, "torch", dtype=torch.float32))) < 2e-5
    assert len(computed) > 1 and all(bool(here.any()) for here in computed)


def test_debug_mode_and_verify(files, the_cpu_as_gpu, capsys):
    path, one, _ = files
    model = load(path, "torch", dtype=torch.float32, gpu_experts=3, debug=True, router_stats=True, adapter=str(one))
    plain = load(path, "torch", dtype=torch.float32)
    assert per_token(logits(model), logits(plain)) < 2e-5
    assert {counts.tokens for counts in get_router_stats(model).values()} == {40}
    assert {wrapper.split.usage.tokens for wrapper in kt_state(model).wrappers} == {40}
    apply_adapter(model, one)
    wanted = Reference(path, kt_state(model).adapters)
    results = list(verify_layers(model, record_inputs(model, range(5, 25)), wanted))
    assert len(results) == 3 and all(result.prompt.base < 1e-5 for result in results)


def test_as_an_operator(files, the_cpu_as_gpu):
    model = load(files[0], "torch", dtype=torch.float32, gpu_experts=3)
    wanted = logits(model)
    torch._dynamo.reset()
    with torch.no_grad():
        found = torch.compile(model, fullgraph=True, backend="eager")(
            input_ids=torch.arange(30, 70).reshape(2, 20)
        ).logits
    torch._dynamo.reset()
    assert per_token(found, wanted) < 1e-5
    with pytest.raises(KTConfigError, match=r"compile: True cannot be combined with gpu_experts"):
        load(files[0], "torch", gpu_experts=3, compile=True)


def test_a_chat(files, the_cpu_as_gpu, monkeypatch):
    """Through LLaMA-Factory: the same answers, and experts that are exchanged between them."""
    pytest.importorskip("llamafactory")
    monkeypatch.setattr(placement, "FIRST", 10)
    path, one, _ = files
    keys = {"adapter": one, "kt_backend": "torch", "max_new_tokens": 12}
    with in_dtype(torch.float32):
        split, plain = (chat_model(path, **keys, **more) for more in ({"kt_gpu_experts": 2}, {}))
    for text in ("Hello", "Who are you?"):
        (found,), (wanted,) = (chat.chat([{"role": "user", "content": text}]) for chat in (split, plain))
        assert found.response_length > 0 and found.response_text == wanted.response_text
    state = kt_state(split.engine.model)
    assert state.placement.counted >= 10 and state.wrappers[0].split.usage.tokens > state.placement.counted
    table = dict(load_rows(split.engine.model))
    assert table["Experts on GPU"] == f"2 of each of 3 layers, the most used of {state.placement.counted} tokens"


# ---- what is refused, and how many fit ----


def test_without_a_gpu(files, monkeypatch):
    monkeypatch.setattr(gpus, "visible", list)
    with pytest.raises(KTConfigError, match=r"gpu_experts: 2 needs a GPU .*Remove it: the CPU computes all experts"):
        load(files[0], "torch", gpu_experts=2)
    monkeypatch.setattr(gpus, "visible", lambda: [torch.device("cuda", 0)])  # which this model is not loaded to
    with pytest.raises(KTConfigError, match=r"gpu_experts: auto needs a GPU .* the model is loaded to"):
        load(files[0], "torch", gpu_experts="auto")


@pytest.mark.parametrize("value", [-1, 2.5, True, "many"])
def test_wrong_values(files, the_cpu_as_gpu, value):
    with pytest.raises(KTConfigError, match="gpu_experts must be a whole number of at least 0 or auto"):
        load(files[0], "torch", gpu_experts=value)


def test_more_than_there_are(files, the_cpu_as_gpu):
    with pytest.raises(KTConfigError, match="kt_gpu_experts: 7 are more than the 6 experts that a layer has"):
        load(files[0], "torch", gpu_experts=7)


@needs_kernel
def test_an_engine_that_cannot_share(files, the_cpu_as_gpu):
    with pytest.raises(
        KTKernelError, match=r"kt_gpu_experts: AMXBF16 cannot leave experts to the GPU; set kt_backend to one of native"
    ):
        load(files[0], "AMXBF16", gpu_experts=2)
    assert kt_state(load(files[0], "auto", gpu_experts=2)).engine.shares


def test_memory(files, the_cpu_as_gpu, monkeypatch, kt_log):
    """An expert of each layer: three matrices of 72 x 96 in bfloat16 and LoRA of rank 5 in float32."""
    path, one, _ = files
    others = sum(p.nbytes for n, p in load(path, "torch").named_parameters())
    each = 3 * (3 * 72 * 96 * 2 + 3 * 5 * (72 + 96) * 4)
    cache = placement.CONTEXT * 3 * 2 * 2 * 16 * 2  # keys and values of 3 layers, 2 heads of 16, in bfloat16
    model = load(path, "torch", gpu_experts=2, adapter=str(one))
    apply_adapter(model, one)
    splits = kt_state(model).placement.layers
    assert sum(split.nbytes for split in splits) == 2 * each
    monkeypatch.setattr(gpus, "free_memory", lambda device: others + 4 * each)
    assert len(kt_state(load(path, "torch", gpu_experts=4, adapter=str(one))).wrappers[0].split.experts) == 4
    with pytest.raises(
        KTMemoryError, match=r"kt_gpu_experts: 5 experts of each layer need .* kt_gpu_experts: auto would take 0"
    ):
        load(path, "torch", gpu_experts=5, adapter=str(one))
    model = load(path, "torch", gpu_experts="auto", adapter=str(one))
    assert kt_state(model).wrappers[0].split is None and "kt_gpu_experts: auto: no expert fits" in kt_log.text
    assert dict(load_rows(model))["Experts on GPU"] == "none"
    monkeypatch.setattr(gpus, "free_memory", lambda device: others + cache + placement.MARGIN + 3 * each)
    assert len(kt_state(load(path, "torch", gpu_experts="auto", adapter=str(one))).wrappers[0].split.experts) == 3


def test_bytes_of_a_weight():
    bf16, f32 = torch.bfloat16, torch.float32
    cases = [("torch", Stored(4), bf16, 4), ("torch", Stored(2), f32, 2), ("native", Stored(0.53), bf16, 2),
             ("INT4", Stored(2), bf16, 2), ("INT8", Stored(2), f32, 4), ("oneDNN", Stored(4), f32, 2)]  # fmt: skip
    for kind, stored, dtype, wanted in cases:
        assert expert_itemsize(get_engine(kind), stored, dtype) == wanted, kind


def test_cache_of_latent_attention(tmp_path):
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(make_model(tmp_path / "model", "deepseek_v2"))
    need = GpuNeed.of(config, [], None, 2, 0, torch.bfloat16)
    assert need.cache == placement.CONTEXT * 3 * 4 * (16 + 8 + 16) * 2
