"""Whether the memory is enough for everything that is measured."""

from __future__ import annotations

import pytest
from helpers.models import make_model

from llamafactory_kt import KTMemoryError
from llamafactory_kt.checkpoint.opening import empty_model
from llamafactory_kt.tools.bench import memory
from llamafactory_kt.tools.bench.configs import bench_configs

CONFIG = {"model_name_or_path": "m", "adapter_name_or_path": "a", "use_kt": True, "kt_backend": "torch"}
GIB = 2**30


def test_room_is_checked_for_all_together(tmp_path, monkeypatch):
    config = {**CONFIG, "model_name_or_path": str(make_model(tmp_path, "mixtral", max_shard_size="200KB"))}
    experts, others, layer = memory.checkpoint_bytes(config["model_name_or_path"])
    assert (
        layer == 6 * 3 * 96 * 64 * 2
        and experts == 3 * layer
        and others
        == sum(p.nbytes for n, p in empty_model(tmp_path).bfloat16().named_parameters() if ".experts." not in n)
    )
    chosen = bench_configs(config, ["stock", "kt_backend=AMXINT4"])
    monkeypatch.setattr(memory, "available_memory", lambda: 36 * GIB)
    weights = memory.CheckpointBytes(8 * GIB, GIB, 2 * GIB)
    needs = memory.check_fit(chosen, weights, gpu_memory=0)
    assert list(needs.values()) == [9 * GIB, 9 * GIB, 9 * GIB, 3 * GIB]
    assert list(memory.check_fit(chosen, weights, gpu_memory=80 * GIB).values()) == [8 * GIB, 8 * GIB, 0, 2 * GIB]
    assert memory.check_fit(chosen, weights, gpu_memory=4 * GIB)["stock"] == 5 * GIB
    with pytest.raises(
        KTMemoryError, match=r"take 36.5 GiB \(.*, stock 9.0 GiB.*, 6.5 GiB for.*; 36.0 GiB are free.*--no-base"
    ):
        memory.check_fit(chosen, weights._replace(layer=3 * GIB), gpu_memory=0)
    same = {**CONFIG, "kt_load": "mmap", "kt_backend": "native"}
    mapped = bench_configs(same, ["stock", "kt_num_threads=1", "kt_backend=INT4"])
    assert list(memory.check_fit(mapped, weights, gpu_memory=0).values()) == [9 * GIB, 0, 9 * GIB, 0, 3 * GIB], (
        "they share pages, all but integers, which are made of them"
    )
    assert memory.checkpoint_bytes("some/name-on-the-hub") is None
