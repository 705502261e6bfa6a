"""Ctrl-C between any two lines of an exchange of adapters: afterwards the model has the old adapter or the new one, as a whole, and works.

Lines are those that the calling thread executes in this package, where Python raises KeyboardInterrupt. A trace function raises it at each
of them in turn.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers.adapters import make_adapter, make_dora
from helpers.children import child
from helpers.interpreters import python
from helpers.loading import load, logits
from helpers.marks import needs_native
from helpers.models import make_model
from helpers.places import DEMO
from safetensors.torch import save_file

import llamafactory_kt
from llamafactory_kt import apply_adapter, load_moe_lora_from_adapter, optimize_for_inference, switch_adapter
from llamafactory_kt.decoding.lora_linear import InferenceLora
from llamafactory_kt.decoding.native_linear import NativeLinear
from llamafactory_kt.ground.tensors.safetensors_files import open_mapped, read_tensor
from llamafactory_kt.ground.uninterrupted import uninterrupted
from llamafactory_kt.model.lock import ModelLock

PACKAGE = str(Path(llamafactory_kt.__file__).parent)
STEPS = "model/lock.py", "ground/uninterrupted.py"
"""what an exchange does in the calling thread"""
CHANGING = *STEPS, "apply.py", "decoding/", "engines/", "model/"
"""whatever may change a model. Files are read before, in thousands of lines that change nothing"""


def interrupted_at(number: int, call: Callable[[], object], files: tuple[str, ...]) -> bool:
    """Whether these files had a line of this number, from 0, to raise KeyboardInterrupt at."""
    left, raised = number, False

    def trace(frame, event, _):
        nonlocal left, raised
        if not frame.f_code.co_filename.removeprefix(f"{PACKAGE}/").startswith(files):
            return None
        if event == "line" and not raised:
            left -= 1
            if left < 0:
                raised = True
                raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    except KeyboardInterrupt:
        assert raised
    finally:
        sys.settrace(before)
    return raised


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    root = tmp_path_factory.mktemp("interrupts")
    model = make_model(root / "model", "qwen3_moe")
    one = make_adapter(root / "one", model, rank=5, alpha=10)
    two = make_adapter(root / "two", model, rank=3, alpha=4, seed=2)
    make_dora(root / "dora", model)
    return model, one, two, root / "dora"


def every_line(call: Callable[[], object], check: Callable[[], None], files: tuple[str, ...]) -> int:
    """The number of lines; ``check`` is called after an interrupt at each."""
    number = 0
    while interrupted_at(number, call, files):
        check()
        number += 1
    return number


@pytest.mark.parametrize(
    ("engine", "where"),
    [
        ("torch", STEPS),
        pytest.param("torch", CHANGING, marks=pytest.mark.nightly),
        pytest.param("native", CHANGING, marks=[needs_native, pytest.mark.nightly]),
    ],
)
def test_exchange_of_lora(files, engine, where):
    path, one, two, _ = files
    model, _ = apply_adapter(load(path, engine, adapter=[str(one), str(two)]), one)
    wanted = {one: logits(model)}
    switch_adapter(model, two)
    wanted[two] = logits(model)
    now = two

    def exchange():
        switch_adapter(model, other(now))

    def other(adapter):
        return one if adapter is two else two

    def check():
        nonlocal now
        now = next(adapter for adapter in (now, other(now)) if torch.equal(logits(model), wanted[adapter]))

    assert every_line(exchange, check, where) > 20
    assert rel_differs(wanted[one], wanted[two])


def rel_differs(one: torch.Tensor, two: torch.Tensor) -> bool:
    return bool((one - two).norm() > 0.02 * two.norm())


def prepared_names(model: torch.nn.Module) -> set[str]:
    return {name for name, module in model.named_modules() if isinstance(module, NativeLinear | InferenceLora)}


@needs_native
@pytest.mark.parametrize("where", [STEPS, pytest.param(CHANGING, marks=pytest.mark.nightly)])
def test_exchange_with_dora_on_a_prepared_model(files, where):
    """DoRA is PEFT's, and the rest the native kernels': no layer is left without what it needs."""
    path, one, _, dora = files
    model = load(path, "native", adapter=[str(one)])
    optimize_for_inference(model)
    model, _ = apply_adapter(model, one)
    wanted = {one: (logits(model), prepared_names(model))}
    switch_adapter(model, dora)
    wanted[dora] = logits(model), prepared_names(model)
    now = dora

    def other(adapter):
        return one if adapter is dora else dora

    def check():
        nonlocal now
        found = logits(model)
        now = next(adapter for adapter in (now, other(now)) if torch.equal(found, wanted[adapter][0]))
        assert prepared_names(model) == wanted[now][1]

    assert every_line(lambda: switch_adapter(model, other(now)), check, where) > 20
    assert rel_differs(wanted[one][0], wanted[dora][0])


def test_the_experts_part_and_preparing(files):
    path, one, two, _ = files
    model = load(path, "torch", adapter=[str(one), str(two)])
    wanted = [logits(model)]
    for adapter in (one, two):
        load_moe_lora_from_adapter(model, adapter)
        wanted.append(logits(model))

    def check():
        found = logits(model)
        assert any(torch.equal(found, one_of) for one_of in wanted)

    assert every_line(lambda: load_moe_lora_from_adapter(model, one), check, STEPS) > 20
    assert every_line(lambda: optimize_for_inference(model), lambda: switch_adapter(model, two), STEPS) > 20


def test_signals_while_the_work_goes_on():
    """However many: one KeyboardInterrupt is raised, at the end."""
    done = []

    def work():
        for number in range(3):
            time.sleep(0.1)
            os.kill(os.getpid(), signal.SIGINT)
            done.append(number)
        time.sleep(0.1)

    with pytest.raises(KeyboardInterrupt):
        uninterrupted(work)
    assert done == [0, 1, 2]


def test_work_is_done_as_the_caller_would():
    with torch.inference_mode():
        assert uninterrupted(torch.is_inference_mode_enabled)
    with torch.no_grad():
        assert not uninterrupted(torch.is_grad_enabled)
    assert uninterrupted(torch.is_grad_enabled) and uninterrupted(lambda: "x") == "x"
    with pytest.raises(ZeroDivisionError):
        uninterrupted(lambda: 1 / 0)


def test_the_lock_after_interrupts_in_generations():
    """None leaves the lock held."""
    lock, armed, stop = ModelLock(), [], threading.Event()

    def handler(*_):
        if armed:
            armed.clear()
            raise KeyboardInterrupt

    def interrupt():
        while not stop.wait(0.0005):
            os.kill(os.getpid(), signal.SIGINT)

    before, thread = signal.signal(signal.SIGINT, handler), threading.Thread(target=interrupt)
    generations, interrupts = 0, 0
    thread.start()
    while interrupts < 300:
        try:
            armed.append(True)
            while True:
                with lock.generation(), lock.generation():
                    generations += 1
        except KeyboardInterrupt:
            interrupts += 1
    stop.set()
    thread.join()
    signal.signal(signal.SIGINT, before)
    assert generations > 10
    assert lock.alone(lambda: "free") == "free"


def test_an_interrupt_while_a_tensor_is_read_stays_one(tmp_path, monkeypatch):
    """torch.asarray asks for the storage's length, in Python, and takes any error there for "has no length"."""
    save_file({"a": torch.ones(300, 5)}, tmp_path / "x.safetensors")
    handle = open_mapped(tmp_path / "x.safetensors")
    assert torch.equal(read_tensor(handle, "a"), torch.ones(300, 5))

    def interrupted(self):
        raise KeyboardInterrupt

    monkeypatch.setattr(torch.UntypedStorage, "__len__", interrupted)
    with pytest.raises(KeyboardInterrupt):
        read_tensor(handle, "a")


@pytest.mark.nightly
def test_interrupted_load(files, tmp_path):
    """Ctrl-C while a chat loads, in our reading and in transformers': one line."""
    config = tmp_path / "chat.yaml"
    config.write_text(f"model_name_or_path: {DEMO / 'model'}\ntemplate: deepseek\nuse_kt: true\nkt_backend: torch\n")
    for where in (
        "llamafactory_kt.model.load.ExpertsLoad.fill",
        "transformers.modeling_utils.PreTrainedModel._load_pretrained_model",
    ):
        module, _, method = where.rpartition(".")
        code = (
            "import os, signal, sys\nfrom llamafactory.cli import main\nimport pkgutil\n"
            f"owner = pkgutil.resolve_name({module!r})\n"
            "def interrupted(*_, **__): os.kill(os.getpid(), signal.SIGINT); [0 for _ in range(10**6)]\n"
            f"owner.{method} = interrupted\nsys.argv = ['llamafactory-cli', 'chat', {str(config)!r}]\nmain()\n"
        )
        run = child(code)
        assert run.returncode == -signal.SIGINT and "Traceback" not in run.stderr, run.stderr
        assert run.stderr.strip().endswith("Interrupted.")


@pytest.mark.parametrize("keys", ["use_kt: true", "use_kt: false"])
def test_interrupted_imports(tmp_path, keys):
    """Ctrl-C before a chat loads, where transformers would say that a module is missing: one line. Without use_kt it is Python's."""
    config = tmp_path / "chat.yaml"
    config.write_text(f"model_name_or_path: {DEMO / 'model'}\ntemplate: deepseek\n{keys}\n")
    run = python(f"""
        import os, signal, sys
        signal.signal(signal.SIGINT, signal.default_int_handler)
        sys.argv = ["/usr/bin/llamafactory-cli", "chat", {str(config)!r}]
        import torch
        os.kill(os.getpid(), signal.SIGINT)
        """)
    assert run.returncode == -signal.SIGINT
    if "true" in keys:
        assert run.stderr == "Interrupted.\n"
    else:
        assert "KeyboardInterrupt" in run.stderr
