"""The number of kt-kernel's sub-pools."""

from __future__ import annotations

from llamafactory_kt.settings.keys import KTArguments, threadpool_count


def test_sub_pools(monkeypatch, tmp_path):
    def made(**keys):
        return threadpool_count(KTArguments(**keys))

    for part in range(2):
        (tmp_path / "_layer_1" / f"_numa_{part}").mkdir(parents=True)
    packed = str(tmp_path)
    monkeypatch.setattr("llamafactory_kt.engines.ktkernel.sub_pools.usable_cores", lambda: 8)
    for nodes in (1, 2, 3):
        monkeypatch.setattr(
            "llamafactory_kt.engines.ktkernel.sub_pools.numa_nodes",
            lambda count=nodes: {node: {0} for node in range(count)},
        )
        assert made() == made(kt_tp_enabled=True, kt_weight_path=packed) == nodes
        assert made(kt_tp_enabled=False) == made(kt_num_threads=1) == 1
        assert made(kt_weight_path=packed) == min(nodes, 2), "as its files are divided, if there are nodes for them"
        assert made(kt_threadpool_count=3) == 3
    monkeypatch.setattr("llamafactory_kt.engines.ktkernel.sub_pools.usable_cores", lambda: 3)
    assert made() == made(kt_tp_enabled=True) == 1, "a worker for each, and as many cores for torch"
