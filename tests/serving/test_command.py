"""The command of an SGLang server: what is passed to it. Bugs have the numbers of a list of those that users met first."""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.adapters import make_adapter
from helpers.children import child
from helpers.marks import needs_kernel
from helpers.models import make_model
from helpers.sglang import rest_only

from llamafactory_kt import KTAdapterError, KTConfigError


def test_bug_1_number_of_gpu_experts_is_never_none(build, adapter):
    assert build().parsed.kt_num_gpu_experts == 0
    assert build(adapter_name_or_path=str(adapter)).parsed.kt_num_gpu_experts == 0
    assert build(kt_num_gpu_experts=3).parsed.kt_num_gpu_experts == 3
    ratio = build(kt_gpu_experts_ratio=0.5).parsed
    assert (ratio.kt_gpu_experts_ratio, ratio.kt_num_gpu_experts) == (0.5, None)


def test_bug_2_number_of_threads_is_never_none(build, monkeypatch):
    for cores, wanted in ((7, 7), (96, 60)):
        monkeypatch.setattr("llamafactory_kt.serving.command.usable_cores", lambda cores=cores: cores)
        assert build().parsed.kt_cpuinfer == wanted
    assert build(kt_num_threads=5).parsed.kt_cpuinfer == build(kt_cpuinfer=5).parsed.kt_cpuinfer == 5
    monkeypatch.setattr(
        "llamafactory_kt.engines.ktkernel.sub_pools.numa_nodes", lambda: {node: {0} for node in range(4)}
    )
    monkeypatch.setattr("llamafactory_kt.engines.ktkernel.sub_pools.usable_cores", lambda: 8)
    assert build(kt_threadpool_count=None).parsed.kt_threadpool_count == 4
    with pytest.raises(KTConfigError, match="3 threads are fewer than kt_threadpool_count: 4"):
        build(kt_threadpool_count=None, kt_cpuinfer=3)


@needs_kernel
def test_bug_3_base_weights_are_where_the_expert_lora_kernel_reads_them(build, adapter, model):
    """For BF16 that is the checkpoint, from which the kernel does load a layer; other methods need a directory of their
    own."""
    parsed = build(adapter_name_or_path=str(adapter), kt_moe_sft_method="AMXBF16_SFT").parsed
    assert Path(parsed.kt_weight_path) == model.resolve() and parsed.kt_method == "BF16"
    code = f"""
    import torch
    from kt_kernel import KTMoEWrapper
    wrapper = KTMoEWrapper(layer_idx=1, num_experts=6, num_experts_per_tok=3, hidden_size=64, moe_intermediate_size=96,
        gpu_experts_mask=None, num_gpu_experts=0, cpuinfer_threads=1, threadpool_count=1, weight_path={parsed.kt_weight_path!r},
        chunked_prefill_size=64, mode="sft", method="AMXBF16_SFT", lora_rank=8, lora_alpha=16.0, max_cache_depth=1)
    wrapper.load_weights(torch.arange(6))
    print("loaded")
    """
    result = child(code)
    assert "loaded" in result.stdout, result.stderr
    for method in ("AMXINT8", "AMXINT4"):
        with pytest.raises(KTConfigError, match=f"kt_method: {method} needs kt_weight_path"):
            build(kt_backend=method)


def test_bug_4_kt_kernels_loader_can_let_go_of_its_files(model):
    from kt_kernel.utils.loader import BF16SafeTensorLoader

    loader = BF16SafeTensorLoader(str(model))
    assert loader.load_experts("model.layers.1")["gate"]
    loader.close_all_handles()


def test_bug_6_cuda_graph_is_disabled_exactly_with_expert_lora(build, adapter, moe_lora, tmp_path):
    rest = rest_only(tmp_path / "rest", adapter)
    for options in ({}, {"options": moe_lora}):
        with_experts = build(**options, adapter_name_or_path=str(adapter))
        assert with_experts.parsed.disable_cuda_graph
        assert any("CUDA graph is disabled" in notice for notice in with_experts.notices)
        for keys in ({}, {"adapter_name_or_path": str(rest)}):
            command = build(**options, **keys)
            assert not command.parsed.disable_cuda_graph and not any("CUDA" in notice for notice in command.notices)


def test_keys_and_extra_options_arrive(build, model):
    command = build(
        extra=["--nnodes", "2", "--node-rank", "1", "--dist-init-addr", "10.0.0.1:5000", "--mem-fraction-static", "0.5"],
        kt_threadpool_count=1, kt_max_deferred_experts_per_token=2, sglang_tp_size=4, sglang_maxlen=100, trust_remote_code=True,
        sglang_config={"max_running_requests": 8, "enable_metrics": True, "enable_lora": False},
    )  # fmt: skip
    parsed = command.parsed
    assert Path(parsed.model_path) == model.resolve() and parsed.trust_remote_code and parsed.enable_metrics
    assert (parsed.tensor_parallel_size, parsed.context_length, parsed.max_running_requests, parsed.enable_lora) == (
        4,
        100,
        8,
        None,
    )
    assert (parsed.nnodes, parsed.node_rank, parsed.mem_fraction_static) == (2, 1, 0.5), "what comes last wins"
    assert parsed.kt_max_deferred_experts_per_token == 2 and not parsed.disable_cuda_graph
    assert "/opt/sglang/bin/python -m sglang.launch_server" in str(command) and "a model'" in str(command)


def test_packed_weights_are_divided_among_as_many_pools(build, tmp_path):
    """Weights packed for one NUMA node would otherwise fail in the server, after it loaded everything else."""
    for pool in range(2):
        (tmp_path / "packed" / "_layer_1" / f"_numa_{pool}").mkdir(parents=True)
    keys = {"kt_backend": "AMXINT8", "kt_weight_path": str(tmp_path / "packed"), "kt_cpuinfer": 4}
    assert build(**keys, kt_threadpool_count=2).parsed.kt_threadpool_count == 2
    with pytest.raises(KTConfigError, match=r"divided among 2 sub-pool\(s\), but kt_threadpool_count is 1"):
        build(**keys, kt_threadpool_count=1)


def test_sizes_that_the_kernel_cannot_take_as_they_are(build, tmp_path, adapter):
    """The experts of the adapter's model are 64 x 96."""
    other = make_model(tmp_path / "other", "qwen3_moe")
    (tmp_path / "packed" / "_layer_1" / "_numa_0").mkdir(parents=True)
    packed = {"kt_backend": "AMXINT4", "kt_weight_path": str(tmp_path / "packed")}
    for keys, message in (
        ({"model": other, "adapter_name_or_path": str(make_adapter(tmp_path / "a", other))}, "hidden_size 72 must be"),
        ({"adapter_name_or_path": str(adapter), "kt_threadpool_count": 2, "kt_cpuinfer": 2}, "96 one of 64 .kt_thread"),
        ({"adapter_name_or_path": str(adapter), **packed}, "hidden_size 64 must be a multiple of 128"),
    ):
        with pytest.raises(KTAdapterError, match=message):
            build(**keys)
