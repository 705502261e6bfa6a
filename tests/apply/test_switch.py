"""Several adapters at once, and switching adapters on a running model."""

from __future__ import annotations

import itertools
import threading
import time
from functools import partial

import pytest
import torch
from helpers.adapters import edit_adapter, make_adapter, make_dora
from helpers.foreign_adapters import BASE, BUNDLE, TARGETS
from helpers.loading import load, logits
from helpers.marks import ENGINES, needs_kernel
from helpers.models import make_model
from helpers.places import DEMO
from helpers.references import merged_float32, per_token, rel

from llamafactory_kt import (
    KTAdapterError,
    KTMemoryError,
    KTModelError,
    apply_adapter,
    choose_adapter,
    load_moe_lora_from_adapter,
    optimize_for_inference,
    switch_adapter,
)
from llamafactory_kt.adapters import open_adapters
from llamafactory_kt.model.state import kt_state

Thread = partial(threading.Thread, daemon=True)  # one that waits for ever must not keep the test run from ending
IDS = torch.arange(30, 70).reshape(2, 20)
DTYPES = {"AMXBF16": torch.bfloat16, "native": torch.bfloat16, "oneDNN": torch.bfloat16, "torch": torch.float32}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A model, an adapter of rank 5 on everything, and one of rank 3 with another scaling on fewer layers."""
    root = tmp_path_factory.mktemp("switch")
    model = make_model(root / "model", "deepseek_v2")
    one = make_adapter(root / "one", model, rank=5, alpha=10)
    two = make_adapter(root / "two", model, rank=3, alpha=4, skip_layers=(1,), seed=2, naming="A")
    edit_adapter(two, lambda tensors: {n: t for n, t in tensors.items() if "o_proj" not in n})
    return model, one, two


def load_engine(path, engine, **keys):
    return load(path, engine, dtype=DTYPES[engine], **keys)


@pytest.mark.parametrize("engine", ENGINES)
def test_several_adapters_add_up(files, engine):
    """Compared with the float32 sum of both; the effect of the second is also compared alone."""
    path, one, two = files
    wanted = {key: logits(merged_float32(path, list(key))) for key in [(one,), (one, two)]}
    model, report = apply_adapter(load_engine(path, engine, adapter=[str(one), str(two)]), [one, two])
    assert report.experts + report.peft == report.total and report.max_rank == 8
    both, first = logits(model), logits(apply_adapter(load_engine(path, engine, adapter=str(one)), one)[0])
    stock = {key: logits(merged_float32(path, list(key), dtype=DTYPES[engine])) for key in wanted}
    effect, others = wanted[one, two] - wanted[one,], stock[one, two] - stock[one,]
    # the bound is stock's own noise in the same dtype; its float32 leaves the order of sums
    assert per_token(both, wanted[one, two]) < 2 * per_token(stock[one, two], wanted[one, two]) + 2e-5
    assert per_token(both - first, effect) < 2 * per_token(others, effect) + 2e-5
    assert rel(wanted[one,], wanted[one, two]) > 0.2, "the second adapter is visible"


@pytest.mark.parametrize("engine", ENGINES)
def test_switching_equals_loading(files, engine):
    """To another adapter, to both, to none and back: bit for bit what a freshly loaded model gives."""
    path, one, two = files
    room = {"adapter": [str(one), str(two)]}  # the same kernels everywhere

    def fresh(adapters):
        model = load_engine(path, engine, **room)
        return logits(apply_adapter(model, adapters)[0] if adapters else model)

    wrapped, _ = apply_adapter(load_engine(path, engine, **room), one)
    plain = load_engine(path, engine, **room)
    for adapters in (two, [one, two], None, one):
        wanted = fresh(adapters)
        for model in (wrapped, plain):
            report = switch_adapter(model, adapters)
            assert report.experts + report.peft == report.total
            assert torch.equal(logits(model), wanted), (adapters, type(model).__name__)
    assert wrapped.peft_config["default"].r == 5
    assert set(dict(wrapped.named_parameters())) == set(
        dict(apply_adapter(load_engine(path, engine, **room), one)[0].named_parameters())
    )


@pytest.mark.parametrize("engine", ENGINES)
def test_choosing_equals_switching(files, engine):
    """Again and again, from the files and from memory, and after other changes; a failure leaves everything as it was."""
    path, one, two = files
    choices = {"two": [str(two)], "both": [str(one), str(two)], "none": []}
    model, _ = apply_adapter(load_engine(path, engine, adapter=str(one), choices=choices), one)
    state = kt_state(model)
    optimize_for_inference(model)
    wanted = {}
    for name in (None, *choices):
        switch_adapter(model, state.choice(name))
        wanted[name] = logits(model)
    assert len({str(values.flatten()[:50].tolist()) for values in wanted.values()}) == 4
    for name in ("two", None, "both", "two", "none", "none", "both", None, "two"):
        report = choose_adapter(model, name)
        assert torch.equal(logits(model), wanted[name]), name
        assert (report is None) == (name == "none") and state.is_in_place(state.choice(name))
    assert len(state.held) == 4
    load_moe_lora_from_adapter(model, one)
    assert not state.is_in_place(state.choice("two"))
    for name in ("two", "both", "two"):
        choose_adapter(model, name)
        assert torch.equal(logits(model), wanted[name]), name


def test_routers_and_whole_modules_go_back_when_chosen(tmp_path):
    make_dora(tmp_path, BASE)
    choices = {"bundle": [str(BUNDLE)], "targets": [str(TARGETS)], "sum": [str(BUNDLE), str(TARGETS)]}
    model = load_engine(BASE, "torch", choices={**choices, "dora": [str(tmp_path)]})
    optimize_for_inference(model)
    wanted = {}
    for name in (None, *choices, "dora"):
        switch_adapter(model, kt_state(model).choice(name))
        wanted[name] = logits(model)
    for name in ("bundle", "targets", "dora", "sum", "dora", "bundle", None, "sum", None, "dora", "bundle"):
        choose_adapter(model, name)
        assert torch.equal(logits(model), wanted[name]), name


@pytest.mark.parametrize("held", [False, True])
def test_a_choice_that_fails(files, held, monkeypatch):
    path, one, two = files
    model, _ = apply_adapter(load_engine(path, "torch", adapter=str(one), choices={"two": [str(two)]}), one)
    before = logits(model)
    choose_adapter(model, "two")
    after = logits(model)
    choose_adapter(model)
    state = kt_state(model)
    if held:
        monkeypatch.setitem(state.held, state.choice("two"), lambda: (_ for _ in ()).throw(OSError("no memory")))
    else:
        state.held.clear()
        monkeypatch.setattr(
            state.wrappers[-1].engine, "set_lora", lambda lora: (_ for _ in ()).throw(OSError("no disk"))
        )
    with pytest.raises(OSError, match="no "):
        choose_adapter(model, "two")
    assert torch.equal(logits(model), before) and state.is_in_place(state.choice(None))
    monkeypatch.undo()
    choose_adapter(model, "two")
    assert torch.equal(logits(model), after)
    with pytest.raises(KTModelError, match="no adapter called 'tow'; kt_adapters has two"):
        choose_adapter(model, "tow")


def test_routers_go_back_to_their_own_weights():
    model = load_engine(BASE, "torch")
    base = logits(model)
    switch_adapter(model, BUNDLE)  # has LoRA on routers
    first = logits(model)
    switch_adapter(model, TARGETS)
    assert not torch.equal(logits(model), first)
    switch_adapter(model, [BUNDLE, TARGETS])
    assert not torch.equal(logits(model), first)
    switch_adapter(model, BUNDLE)
    assert torch.equal(logits(model), first)
    switch_adapter(model, None)
    assert torch.equal(logits(model), base)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_larger_rank_than_was_expected(files, engine, tmp_path, monkeypatch):
    path = files[0]
    big = make_adapter(tmp_path / "big", path, rank=24, alpha=24, seed=3)
    model = load_engine(path, engine, lora_rank=4)
    switch_adapter(model, big)
    assert per_token(logits(model), logits(merged_float32(path, big))) < 0.1
    if engine == "AMXBF16":
        bigger = make_adapter(tmp_path / "bigger", path, rank=25, alpha=24, seed=3)
        monkeypatch.setattr("llamafactory_kt.apply.available_memory", lambda: 1000)
        before = logits(model)
        with pytest.raises(KTMemoryError, match=r"larger ones need .* and 1\.0 KiB are free"):
            switch_adapter(model, bigger)
        assert torch.equal(logits(model), before)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("carries", [True, False])
def test_a_failure_in_the_middle_leaves_everything_as_it_was(files, engine, carries, monkeypatch):
    path, one, two = files
    model = load_engine(
        path, engine, lora_rank=4 if carries else 16
    )  # small: every kernel is built anew, and given back
    model = apply_adapter(model, one)[0] if carries else model
    before, names = logits(model), [name for name, _ in model.named_parameters()]
    kernels = [getattr(wrapper.engine, "kernel", None) for wrapper in kt_state(model).wrappers]
    last = kt_state(model).wrappers[-1].engine
    monkeypatch.setattr(last, "set_lora", lambda lora: (_ for _ in ()).throw(OSError("the disk is gone")))
    for change, adapters in itertools.product((switch_adapter, load_moe_lora_from_adapter), ([one, two], two)):
        with pytest.raises(OSError, match="the disk is gone"):
            change(model, adapters)
        assert torch.equal(logits(model), before)
        assert [name for name, _ in model.named_parameters()] == names
        assert kernels == [getattr(wrapper.engine, "kernel", None) for wrapper in kt_state(model).wrappers]
    monkeypatch.undo()
    switch_adapter(model, two)
    assert not torch.equal(logits(model), before)


def test_what_peft_refuses_leaves_everything_as_it_was(files, tmp_path):
    path, one, _ = files
    bad = make_adapter(tmp_path / "bad", path, rank=5, alpha=10)
    edit_adapter(bad, lambda t: {n: x for n, x in t.items() if "layers.0.self_attn.q_proj.lora_B" not in n})
    model, _ = apply_adapter(load_engine(path, "torch"), one)
    before = logits(model)
    with pytest.raises(KTAdapterError, match=r"lora_B\.weight is missing; the file"):
        switch_adapter(model, bad)
    assert torch.equal(logits(model), before)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"use_dora": True}, "has use_dora, which cannot be added"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save: .*'lm_head'"),
    ],
)
def test_what_is_no_sum_is_refused(files, tmp_path, config, message):
    path, one, _ = files
    other = make_adapter(tmp_path / "other", path, skip_layers=(0, 1, 2), **config)
    with pytest.raises(KTAdapterError, match=message):
        open_adapters([one, other])


class Slow:
    """A streamer that stops at the first token until it is told to go on."""

    def __init__(self):
        self.started, self.go = threading.Event(), threading.Event()

    def put(self, value):
        self.started.set()
        assert self.go.wait(60)

    def end(self):
        pass


def generate(model, **keys):
    return model.generate(
        input_ids=IDS[:1], max_new_tokens=12, min_new_tokens=12, do_sample=False, pad_token_id=1, **keys
    ).tolist()


def test_a_generation_sees_one_adapter(files):
    path, one, two = files
    model, _ = apply_adapter(load_engine(path, "torch"), one)
    old = generate(model)
    switch_adapter(model, two)
    new = generate(model)
    assert old != new
    switch_adapter(model, one)

    found, streamer = {}, Slow()
    running = Thread(target=lambda: found.update(first=generate(model, streamer=streamer)))
    running.start()
    assert streamer.started.wait(60)
    switching = Thread(target=lambda: found.update(report=switch_adapter(model, two)))
    switching.start()
    later = Thread(target=lambda: found.update(second=generate(model)))
    while not kt_state(model).lock._turn.locked():  # then it waits
        time.sleep(0.01)
    later.start()
    later.join(0.5)
    assert not found and switching.is_alive(), "the exchange waits for the first, the second for the exchange"
    streamer.go.set()
    for thread in (running, switching, later):
        thread.join(60)
    assert (found["first"], found["second"]) == (old, new)


def test_a_generation_cannot_exchange_its_own_adapter(files):
    path, one, _ = files
    model = load_engine(path, "torch")

    class Exchange(Slow):
        def put(self, value):
            switch_adapter(model, one)

    with pytest.raises(RuntimeError, match="from within a generation"):
        generate(model, streamer=Exchange())
    switch_adapter(model, one)  # and the gate is open again


@needs_kernel
def test_through_llamafactory():
    from llamafactory.chat import ChatModel

    adapter = DEMO / "adapter"
    twice = ChatModel(
        {"model_name_or_path": str(DEMO / "model"), "adapter_name_or_path": f"{adapter},{adapter}", "template": "deepseek",
         "use_kt": True, "do_sample": False}
    )  # fmt: skip
    model = twice.engine.model
    lora = {name: value.dtype for name, value in model.named_parameters() if ".lora_" in name}
    assert {name.split(".")[-2] for name in lora} == {"default", "adapter_2"}
    assert set(lora.values()) == {torch.float32}, (
        "as the files have them; PEFT rounds all but the first to the model's type"
    )
    assert all(wrapper.engine.lora_rank == 16 for wrapper in kt_state(model).wrappers)
    ask = [{"role": "user", "content": "Hello, who are you?"}]
    switch_adapter(model, adapter)
    assert "Kiki" in twice.chat(ask)[0].response_text
    switch_adapter(model, None)
    assert twice.chat(ask)[0].response_text == "Hello! I am a tiny mixture-of-experts model made for a demonstration."
