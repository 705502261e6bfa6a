"""Sub-pools on two NUMA nodes, which share each expert's intermediate size between them: with and without an adapter, against
the float32 model. kt-kernel keeps one pool a process, so each engine gets a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import needs_base_kernel, needs_kernel
from tiny import make_adapter, make_model, merged_float32, per_token

from llamafactory_kt.machine import numa_nodes

pytestmark = pytest.mark.skipif(numa_nodes() < 2, reason="this machine has one NUMA node")

CHAT = """
import json, sys
import torch
from test_experts import answer, load
from llamafactory_kt import apply_adapter, switch_adapter
from llamafactory_kt.quantize import quantize_model

model, adapter, out, keys = *sys.argv[1:4], json.loads(sys.argv[4])
if keys["backend"] == "AMXINT8":
    keys["weight_path"] = out + "/int8"
    quantize_model(model, keys["weight_path"], "int8", pools=2, threads=2)
keys |= {"threadpool_count": 2, "num_threads": 2}
loaded, _ = apply_adapter(load(model, adapter=adapter, **keys), adapter)
whole = answer(loaded)
assert [w.engine._kernel.kind.packed.pools for w in loaded._kt_wrappers] == [2, 2]
if loaded._kt_merged is None:
    switch_adapter(loaded, None)
else:
    loaded = load(model, **keys)
torch.save((answer(loaded), whole), out + "/answers")
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


@pytest.mark.parametrize("backend", ENGINES)
def test_two_sub_pools(files, backend, tmp_path):
    model, adapter = files
    run = subprocess.run(
        [sys.executable, "-c", CHAT, model, adapter, tmp_path, json.dumps({"backend": backend})],
        cwd=Path(__file__).parent, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    found = [logits.float() for logits in torch.load(tmp_path / "answers")]
    with torch.inference_mode():
        wanted = [merged_float32(model, a)(input_ids=torch.arange(2, 40)[None]).logits for a in (None, adapter)]
    bound = BOUNDS.get(backend, 0.05)
    assert per_token(found[0], wanted[0]) < bound and per_token(found[1], wanted[1]) < bound
    effects = (found[1] - found[0]).flatten(), (wanted[1] - wanted[0]).flatten()
    assert torch.cosine_similarity(*effects, dim=0) > (0.95 if backend == "AMXINT4" else 0.99)
