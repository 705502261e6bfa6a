"""Where kt-kernel's workers run, and sub-pools on two NUMA nodes, which divide each expert's intermediate size between
them: with and without an adapter, compared with the float32 model.

kt-kernel keeps one pool per process, so each test starts a process of its own.
"""

from __future__ import annotations

import json
import os

import pytest
import torch
from helpers.adapters import make_adapter
from helpers.children import child
from helpers.marks import needs_base_kernel, needs_kernel
from helpers.models import make_model
from helpers.references import merged_float32, per_token

from llamafactory_kt.ground.machine import numa_nodes

needs_two_nodes = pytest.mark.skipif(len(numa_nodes()) < 2, reason="this machine has one NUMA node")
CHAT = """
import json, os, sys
import torch
from helpers.loading import answer, load
from llamafactory_kt import apply_adapter, switch_adapter
from llamafactory_kt.engines.ktkernel.cpuinfer import worker_threads
from llamafactory_kt.model.state import kt_state
from llamafactory_kt.tools.quantize import quantize_model

model, adapter, out, keys = *sys.argv[1:4], json.loads(sys.argv[4])
os.sched_setaffinity(0, keys.pop("cpus"))
if keys["backend"] == "AMXINT8":
    keys["weight_path"] = out + "/int8"
    quantize_model(model, keys["weight_path"], "amxint8", threads=2)
loaded, _ = apply_adapter(load(model, adapter=adapter, **keys), adapter)
whole = answer(loaded)
if kt_state(loaded).merged is None:
    switch_adapter(loaded, None)
else:
    loaded = load(model, **keys)
torch.save((answer(loaded), whole), out + "/answers")
workers = [(node, sorted(os.sched_getaffinity(thread))) for thread, node in worker_threads()]
print(json.dumps({"pools": kt_state(loaded).options.pools, "workers": workers}))
"""
SFT_KERNELS = "AMXBF16", "AMXINT8", "AMXINT4"
ENGINES = [
    *(pytest.param(name, marks=needs_kernel) for name in SFT_KERNELS),
    pytest.param("AVX2BF16", marks=needs_base_kernel),
]
BOUNDS = {"AMXINT8": 0.09, "AMXINT4": 0.75}
"""of a whole model; others 0.05"""


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    root = tmp_path_factory.mktemp("files")
    model = make_model(root / "model", "deepseek_v2")
    return model, make_adapter(root / "adapter", model, rank=4)


def chat(files, out, backend, cpus, **keys):
    """Run a process with this affinity and compare its answers with the float32 model's. Returns its number of sub-
    pools, and the NUMA node and the CPUs of each worker."""
    model, adapter = files
    run = child(CHAT, model, adapter, out, json.dumps({"backend": backend, "cpus": sorted(cpus), **keys}))
    assert run.returncode == 0, run.stderr
    found = [logits.float() for logits in torch.load(out / "answers")]
    with torch.inference_mode():
        wanted = [merged_float32(model, a)(input_ids=torch.arange(2, 40)[None]).logits for a in (None, adapter)]
    bound = BOUNDS.get(backend, 0.05)
    assert per_token(found[0], wanted[0]) < bound and per_token(found[1], wanted[1]) < bound
    effects = (found[1] - found[0]).flatten(), (wanted[1] - wanted[0]).flatten()
    assert torch.cosine_similarity(*effects, dim=0) > (0.95 if backend == "AMXINT4" else 0.99)
    said = json.loads(run.stdout.splitlines()[-1])
    return said["pools"], [(node, set(cpus)) for node, cpus in said["workers"]]


@needs_two_nodes
@pytest.mark.parametrize("backend", ENGINES)
def test_a_sub_pool_on_each_node(files, backend, tmp_path):
    nodes = numa_nodes()
    pools, workers = chat(files, tmp_path, backend, set.union(*nodes.values()))
    assert pools == len(nodes) == len({node for node, _ in workers})
    assert all(cpus <= nodes[node] for node, cpus in workers)


@needs_two_nodes
@pytest.mark.parametrize("backend", ENGINES)
def test_a_process_that_may_use_the_second_node_alone(files, backend, tmp_path):
    node, cpus = list(numa_nodes().items())[1]
    pools, workers = chat(files, tmp_path, backend, cpus)
    assert pools == 1 and workers and all(where == node and on <= cpus for where, on in workers)


@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="there is one CPU")
@pytest.mark.parametrize("backend", ENGINES)
def test_workers_keep_to_the_cpus_of_their_process(files, backend, tmp_path):
    cpu = max(os.sched_getaffinity(0))  # kt-kernel takes the first core of a node
    _, workers = chat(files, tmp_path, backend, {cpu}, num_threads=1)
    assert [cpus for _, cpus in workers] == [{cpu}]
