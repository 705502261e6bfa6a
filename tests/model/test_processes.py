"""Processes that are killed while they load, that are forked from one with a model, or that run beside one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.marks import KERNEL_PROBLEM, needs_kernel, needs_native
from helpers.places import ROOT

ENGINE = "torch" if KERNEL_PROBLEM else "AMXBF16"
ENGINES = [pytest.param("AMXBF16", marks=needs_kernel), pytest.param("native", marks=needs_native), "torch"]

LOAD = """
import json, os, signal, sys, time
import torch
from transformers import AutoModelForCausalLM
from llamafactory_kt import KTExpertsConfig, apply_adapter
directory, backend = sys.argv[1:3]
def load():
    config = KTExpertsConfig(backend=backend, adapter=directory + "/adapter")
    model = AutoModelForCausalLM.from_pretrained(directory + "/model", quantization_config=config, dtype=torch.bfloat16)
    return apply_adapter(model, directory + "/adapter")[0]
def answer(model):
    ids = torch.arange(30, 60)[None]
    return model.generate(input_ids=ids, attention_mask=ids > 0, max_new_tokens=6, min_new_tokens=6, do_sample=False)[0, 30:].tolist()
def end_of(pid):
    for _ in range(600):
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return status
        time.sleep(0.1)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return "hung"
"""
KILLED = """
from llamafactory_kt.engines.registry import get_engine
engine, count = get_engine(backend), 0
def load_layer(self, load=engine.load):
    global count
    load(self)
    count += 1
    if count == 2:
        os.kill(os.getpid(), signal.SIGKILL)
engine.load = load_layer
load()
"""
BESIDE = "print(json.dumps(answer(load())))"
FORKED = """
model = load()
first = answer(model)
said = {}
for task in ("generate", "load", "nothing"):
    reader, writer = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            if task != "nothing":
                answer(model if task == "generate" else load())
            os.write(writer, b"fine")
        except Exception as error:
            os.write(writer, f"{type(error).__name__}: {error}".encode())
        sys.exit(0)  # the interpreter's whole end, and not os._exit as multiprocessing has it
    status = end_of(pid)
    os.close(writer)
    said[task] = [status, os.read(reader, 10000).decode()]
print(json.dumps([said, answer(model) == first]))
"""

WAITING = """
def waiting():
    before = len(os.listdir("/proc/self/task"))
    torch.ones(512, 512) @ torch.ones(512, 512)
    return len(os.listdir("/proc/self/task")) - before
"""
"""How many threads a product of the calling thread had to start; those of its product before would have waited."""
AT_REST = """
import threading
said = [waiting(), waiting()]
model = load()
said += [waiting(), waiting()]
def chat():
    waiting()
    answer(model)
    said.append(waiting())
thread = threading.Thread(target=chat)
thread.start()
thread.join()
print(json.dumps(said))
"""
FORKED_BEFORE = """
waiting()
pid = os.fork()
if not pid:
    torch.set_num_threads(1)
    answer(load())
    os._exit(0)
print(json.dumps(end_of(pid)))
"""


def start(code: str, demo: Path, engine: str, **keys) -> subprocess.Popen:
    """With two OpenMP threads: with one, there would be none to miss."""
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "2", **keys.pop("env", {})}
    command = [sys.executable, "-c", LOAD + code, str(demo.absolute()), engine]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env, **keys)


def finish(process: subprocess.Popen):
    """The last line it printed."""
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return json.loads(out.splitlines()[-1])


def test_kill_9_in_a_load_leaves_nothing(tmp_path, demo):
    """Nothing in the working directory, among the temporary files, or beside the model."""
    files = {*demo.rglob("*")}
    killed = start(KILLED, demo, ENGINE, cwd=tmp_path, env={"TMPDIR": str(tmp_path)})
    err = killed.communicate(timeout=300)[1]
    assert killed.returncode == -signal.SIGKILL, err
    assert {*demo.rglob("*")} == files
    left = [path.name for path in tmp_path.rglob("*") if path.is_file()]
    assert set(left) <= {"_remote_module_non_scriptable.py"}, "which torch writes when it is imported"
    both = [start(BESIDE, demo, ENGINE), start(BESIDE, demo, ENGINE)]  # and two at once do not disturb each other
    first, second = map(finish, both)
    assert first == second and len(first) == 6


@pytest.mark.parametrize("engine", ENGINES)
def test_a_forked_child_does_not_hang(demo, engine):
    said, parent_is_well = finish(start(FORKED, demo, engine))
    assert parent_is_well and [status for status, _ in said.values()] == [0, 0, 0], said
    assert "which was forked from it: the threads that compute them do not survive" in said["generate"][1]
    assert said["load"][1].startswith("KTKernelError: KT experts of process"), "OpenMP's threads are missing too"
    assert said["nothing"][1] == "fine"


def test_no_threads_wait_between_generations(demo):
    """With two teams of OpenMP threads, no thread would spin, and every product of the next answer would have to wake
    them."""
    assert finish(start(WAITING + AT_REST, demo, "torch")) == [1, 0, 1, 0, 1]


def test_a_child_of_a_process_that_has_threads(demo):
    assert finish(start(WAITING + FORKED_BEFORE, demo, "torch")) == 0
