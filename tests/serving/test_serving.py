"""A configuration as an SGLang server's command: what is passed, what is prepared, what is refused."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import SGLANG_CONTRACT, needs_kernel
from safetensors.torch import load_file
from standin_server import RECORDED, configuration, install_sglang_kt, interpreter
from tiny import edit_adapter, make_adapter, make_model

from llamafactory_kt import KTAdapterError, KTConfigError, KTError, KTModelError, KTPathError, KTServerError
from llamafactory_kt.cli.serve import model_arguments
from llamafactory_kt.serving import adapter_cache
from llamafactory_kt.serving.command import server_command
from llamafactory_kt.serving.options import ServerOptions, discover


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return make_model(tmp_path_factory.mktemp("models") / "a model", "deepseek_v2")


@pytest.fixture(scope="module")
def adapter(tmp_path_factory, model) -> Path:
    """Experts and the rest; layer 2 has no expert LoRA."""
    return make_adapter(tmp_path_factory.mktemp("adapters") / "whole", model, skip_layers=(2,))


@pytest.fixture(scope="module")
def recorded() -> ServerOptions:
    facts = json.loads(RECORDED.read_text())
    return ServerOptions("/opt/sglang/bin/python", "sglang-kt 0.7.2", facts["options"], facts["architectures"])


@pytest.fixture
def moe_lora(tmp_path) -> ServerOptions:
    return discover(str(interpreter(tmp_path, STANDIN_DIALECT="moe-lora")))


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("LLAMAFACTORY_KT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "adapters"


@pytest.fixture
def build(tmp_path, model, recorded):
    def build(options=recorded, extra=(), **keys):
        args = model_arguments(configuration(tmp_path, Path(sys.executable), keys.pop("model", model), **keys))
        return server_command(args, options, extra)

    return build


def experts_only(directory: Path, adapter: Path) -> Path:
    shutil.copytree(adapter, directory)
    return edit_adapter(directory, lambda tensors: {n: t for n, t in tensors.items() if ".mlp.experts." in n})


def rest_only(directory: Path, adapter: Path) -> Path:
    shutil.copytree(adapter, directory)
    gone = (".mlp.experts.", ".kv_b_proj.")  # kv_b_proj: see test_latent_attention
    return edit_adapter(directory, lambda tensors: {n: t for n, t in tensors.items() if not any(g in n for g in gone)})


# The six bugs that users met when they first served expert LoRA with SGLang.


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
    """BF16: the checkpoint, and the kernel does load a layer from what is passed. Others: a directory of their own."""
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
    result = subprocess.run(
        [sys.executable, "-c", "\n".join(map(str.strip, code.splitlines()))], capture_output=True, text=True
    )
    assert "loaded" in result.stdout, result.stderr
    for method in ("AMXINT8", "AMXINT4"):
        with pytest.raises(KTConfigError, match=f"kt_method: {method} needs kt_weight_path"):
            build(kt_backend=method)


def test_bug_4_kt_kernels_loader_can_let_go_of_its_files(model):
    from kt_kernel.utils.loader import BF16SafeTensorLoader

    loader = BF16SafeTensorLoader(str(model))
    assert loader.load_experts("model.layers.1")["gate"]
    loader.close_all_handles()


def test_bug_5_nothing_of_another_format_lies_under_safetensors(build, adapter, moe_lora, cache):
    """Everything prepared is outside of the adapter's directory, and each name is of the file's format."""
    before = sorted(adapter.iterdir())
    build(adapter_name_or_path=str(adapter))
    build(moe_lora, adapter_name_or_path=str(adapter))
    assert sorted(adapter.iterdir()) == before
    files = {path.name: path for path in cache.rglob("*.*") if path.is_file()}
    assert set(files) == {"entry.json", "adapter_config.json", "adapter_model.safetensors", "moe_lora.pt", ".lock"}
    assert all(load_file(path) for path in cache.rglob("*.safetensors"))
    assert torch.load(files["moe_lora.pt"], weights_only=True)["metadata"]["lora_rank"] == 8


def test_bug_6_cuda_graph_is_disabled_exactly_with_expert_lora(build, adapter, moe_lora, tmp_path):
    rest = rest_only(tmp_path / "rest", adapter)
    for options in ({}, {"options": moe_lora}):
        with_experts = build(**options, adapter_name_or_path=str(adapter))
        assert with_experts.parsed.disable_cuda_graph
        assert any("CUDA graph is disabled" in notice for notice in with_experts.notices)
        for keys in ({}, {"adapter_name_or_path": str(rest)}):
            command = build(**options, **keys)
            assert not command.parsed.disable_cuda_graph and not any("CUDA" in notice for notice in command.notices)


# The command.


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


def test_dialects(build, adapter, moe_lora, tmp_path):
    experts, rest = experts_only(tmp_path / "e", adapter), rest_only(tmp_path / "r", adapter)
    whole = build(adapter_name_or_path=str(adapter))
    assert whole.parsed.lora_paths[0].startswith("lora0=") and whole.parsed.kt_expert_lora_path is None
    assert "Every request must name the adapter" in whole.request_notice
    called_out = "Every request gets the experts' LoRA, also one to the base model"
    assert not any(called_out in notice for notice in whole.notices), "SGLang refuses such requests"
    alone = build(adapter_name_or_path=str(experts))
    assert (
        alone.parsed.lora_paths is None
        and Path(alone.parsed.kt_expert_lora_path).is_dir()
        and alone.request_notice is None
        and any(called_out in notice for notice in alone.notices)
    )
    assert build(adapter_name_or_path=str(rest)).parsed.kt_expert_lora_path is None

    old = build(moe_lora, adapter_name_or_path=str(adapter)).parsed
    assert (old.kt_moe_lora_rank, old.kt_moe_lora_alpha, old.kt_moe_sft_method) == (8, 16.0, "AMXBF16_SFT")
    assert Path(old.kt_moe_lora_path).name == "moe_lora.pt" and old.disable_radix_cache
    names = load_file(Path(old.lora_paths[0].partition("=")[2]) / "adapter_model.safetensors")
    assert names and not any(".mlp.experts." in name for name in names)
    with_rest = build(moe_lora, adapter_name_or_path=str(adapter))
    assert any(called_out in notice for notice in with_rest.notices)
    assert "Only requests that name the adapter get the rest of it" in with_rest.request_notice
    beside = build(adapter_name_or_path=str(rest), kt_moe_lora_path=old.kt_moe_lora_path)
    assert beside.adapter.experts and beside.adapter.name == "lora0"
    only = build(kt_moe_lora_path=old.kt_moe_lora_path, kt_moe_lora_rank=8, kt_moe_lora_alpha=16)
    assert Path(only.parsed.kt_expert_lora_path).is_dir() and only.adapter.name is None

    without = discover(str(interpreter(tmp_path, STANDIN_DIALECT="none")))
    with pytest.raises(KTServerError, match=r"has LoRA on routed experts, which sglang-kt 0.7.2 cannot apply"):
        build(without, adapter_name_or_path=str(adapter))
    assert build(without, adapter_name_or_path=str(rest)).adapter.name == "lora0"


def test_servers_that_cannot_serve(tmp_path):
    with pytest.raises(KTServerError, match=r"no SGLang. Install sglang-kt"):
        discover(str(interpreter(tmp_path, tmp_path / "nothing")))
    with pytest.raises(KTServerError, match="an SGLang without KTransformers"):
        discover(str(interpreter(tmp_path, STANDIN_DIALECT="plain")))
    broken = tmp_path / "broken" / "sglang"
    broken.mkdir(parents=True)
    (broken / "__init__.py").write_text("raise ImportError('libcuda.so.1: cannot open shared object file')")
    with pytest.raises(KTServerError, match=r"cannot be imported by .*a venv/python: ImportError: libcuda.so.1"):
        discover(str(interpreter(tmp_path, broken.parent)))


def test_prepared_adapter_means_the_same(build, model, tmp_path):
    """rsLoRA and ranks of their own: SGLang takes alpha / r of one config for everything, so the rest is folded and padded."""
    source = make_adapter(tmp_path / "a", model, rank=4, alpha=6, use_rslora=True, dtype=torch.float32)

    def wider(tensors):
        for name in [n for n in tensors if "q_proj.lora" in n]:
            tensors[name] = torch.cat([tensors[name]] * 2, dim=0 if ".lora_A." in name else 1)
        return tensors

    edit_adapter(source, wider)
    config = json.loads((source / "adapter_config.json").read_text())
    (source / "adapter_config.json").write_text(json.dumps({**config, "rank_pattern": {"q_proj": 8}}))
    merged = Path(build(adapter_name_or_path=str(source)).parsed.lora_paths[0].partition("=")[2])
    theirs, ours = (
        json.loads((merged / "adapter_config.json").read_text()),
        load_file(merged / "adapter_model.safetensors"),
    )
    before = load_file(source / "adapter_model.safetensors")
    assert theirs["r"] == 8 and not theirs["use_rslora"] and not theirs["rank_pattern"] and len(ours) == len(before)
    for name in [n for n in before if ".lora_A." in n]:
        other = name.replace(".lora_A.", ".lora_B.")
        rank = before[name].shape[0]
        wanted = 6 / rank**0.5 * before[other] @ before[name]
        found = theirs["lora_alpha"] / theirs["r"] * ours[other] @ ours[name]
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


def test_layers_without_expert_lora_get_zeros(build, adapter):
    """SGLang looks for every layer with routed experts."""
    merged = Path(build(adapter_name_or_path=str(adapter)).parsed.lora_paths[0].partition("=")[2])
    tensors = {
        n: t for n, t in load_file(merged / "adapter_model.safetensors").items() if ".layers.2.mlp.experts." in n
    }
    assert len(tensors) == 6 * 3 * 2 and not any(tensor.any() for tensor in tensors.values())


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"kt_backend": "torch"}, "kt_backend: torch is an engine of infer_backend: huggingface"),
        ({"kt_backend": "oneDNN"}, "kt_backend: oneDNN is an engine of infer_backend: huggingface"),
        ({"kt_backend": "AMXINT4", "kt_method": "BF16", "kt_weight_path": "/tmp"}, "is contradictory: kt_method: BF16"),
        ({"kt_method": "AMXINT9"}, "kt_method: unknown value 'AMXINT9'"),
        ({"kt_weight_path": "/tmp"}, "but not in which format: add kt_method"),
        ({"kt_weight_path": "/nowhere", "kt_method": "AMXINT8"}, "kt_weight_path: /nowhere does not exist"),
        ({"kt_method": "AMXINT4"}, "AMXINT4 needs kt_weight_path, .* llamafactory-kt quantize --method int4 writes it"),
        ({"kt_num_threads": 4, "kt_cpuinfer": 5}, "kt_num_threads is 4, but kt_cpuinfer 5"),
        ({"kt_num_gpu_experts": 1, "kt_gpu_experts_ratio": 0.1}, "say the same in two ways"),
        ({"kt_gpu_experts_ratio": 2}, "kt_gpu_experts_ratio must be a number of at least 0 and at most 1, found 2"),
        ({"kt_lora_scope": "attention"}, "kt_lora_scope: attention works with infer_backend: huggingface only"),
        ({"kt_moe_lora_rank": 8}, "kt_moe_lora_rank: there is no adapter"),
        ({"kt_sglang_python": "/nowhere/python"}, "kt_sglang_python must be the path of a Python interpreter"),
        ({"sglang_config": {"max_runing_requests": 4}}, "no option --max-runing-requests .did you mean --max-running-requests"),
        ({"sglang_lora_backend": "flashinfer", "adapter_name_or_path": "ADAPTER"}, "invalid choice: 'flashinfer'"),
        ({"adapter_name_or_path": "ADAPTER,ADAPTER"}, "SGLang with KT serves one adapter, found 2"),
        ({"adapter_name_or_path": "ADAPTER", "kt_moe_lora_rank": 16}, "kt_moe_lora_rank is 16, but .* says 8"),
        ({"adapter_name_or_path": "ADAPTER", "kt_moe_lora_alpha": 32}, "kt_moe_lora_alpha is 32, but .* says 16"),
        ({"adapter_name_or_path": "ADAPTER", "kt_num_gpu_experts": 2}, "all experts must be on the CPU"),
        ({"adapter_name_or_path": "ADAPTER", "sglang_config": {"max_running_requests": 1}}, "must be at least 2, found 1"),
        ({"adapter_name_or_path": "ADAPTER", "sglang_config": {"pp_size": 2}}, "--pp-size must be 1"),
        ({"adapter_name_or_path": "ADAPTER", "kt_method": "MOE_INT8", "kt_weight_path": "/tmp"}, "no kernel for the LoRA"),
        ({"adapter_name_or_path": "ADAPTER", "kt_method": "AMXINT8", "kt_weight_path": "/tmp"}, "has no _layer_N/_numa_N"),
        ({"model_name_or_path": "org/name"}, "is not a local directory, and SGLang with KT reads the experts from"),
        ({"no_such_key": 1}, "no_such_key"),
    ],
)  # fmt: skip
def test_refused_before_the_server_starts(build, adapter, keys, message):
    keys = {
        name: value.replace("ADAPTER", str(adapter)) if isinstance(value, str) else value
        for name, value in keys.items()
    }
    with pytest.raises(KTError, match=message):
        build(**keys)


def test_models_and_adapters_that_the_server_does_not_have(build, tmp_path, model, adapter):
    with pytest.raises(KTModelError, match=r"is a GlmFictionForCausalLM, which sglang-kt 0.7.2 does not have"):
        build(model=_with_config(tmp_path / "m", model, architectures=["GlmFictionForCausalLM"]))
    with pytest.raises(KTModelError, match="no routed experts that SGLang's KT would find"):
        build(model=_with_config(tmp_path / "n", model, n_routed_experts=None))
    other = make_model(tmp_path / "other", "qwen3_moe")
    with pytest.raises(KTAdapterError):
        build(model=other, adapter_name_or_path=str(adapter))
    odd = edit_adapter(
        make_adapter(tmp_path / "odd", model),
        lambda tensors: {name.replace("q_proj", "odd_proj"): tensor for name, tensor in tensors.items()},
    )
    with pytest.raises(KTAdapterError, match=r"sglang-kt 0.7.2 has no LoRA for odd_proj; it has it for .*\bq_proj"):
        build(adapter_name_or_path=str(odd))
    for absent in ("q_proj", "v_proj"):
        half = edit_adapter(
            make_adapter(tmp_path / absent, other),
            lambda tensors, absent=absent: {n: t for n, t in tensors.items() if f".{absent}." not in n},
        )
        with pytest.raises(KTAdapterError, match=rf"not on model.layers.0.self_attn.{absent}, .* Merge this adapter"):
            build(model=other, adapter_name_or_path=str(half))


def test_packed_weights_are_divided_among_as_many_pools(build, tmp_path):
    """A directory for one NUMA node would otherwise fail in the server, after it loaded everything else."""
    for pool in range(2):
        (tmp_path / "packed" / "_layer_1" / f"_numa_{pool}").mkdir(parents=True)
    keys = {"kt_backend": "AMXINT8", "kt_weight_path": str(tmp_path / "packed"), "kt_cpuinfer": 4}
    assert build(**keys, kt_threadpool_count=2).parsed.kt_threadpool_count == 2
    with pytest.raises(KTConfigError, match=r"divided among 2 sub-pool\(s\), but kt_threadpool_count is 1"):
        build(**keys, kt_threadpool_count=1)


def test_sizes_that_the_kernel_cannot_take_as_they_are(build, tmp_path, adapter):
    """The adapter's model has experts of 64 x 96."""
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


def test_latent_attention(build, adapter, tmp_path):
    """SGLang adds the LoRA of kv_b_proj while decoding only where there is expert LoRA, too."""
    assert build(adapter_name_or_path=str(adapter)).adapter.required
    rest = shutil.copytree(adapter, tmp_path / "rest")
    edit_adapter(rest, lambda tensors: {n: t for n, t in tensors.items() if ".mlp.experts." not in n})
    with pytest.raises(KTAdapterError, match="LoRA on kv_b_proj, but none on routed experts"):
        build(adapter_name_or_path=str(rest))


def _with_config(directory: Path, model: Path, **changes) -> Path:
    directory.mkdir()
    config = {**json.loads((model / "config.json").read_text()), **changes}
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def test_other_backends_stay_refused_and_serving_keys_do_nothing_there(kt_log, model):
    from llamafactory.hparams.parser import _parse_infer_args

    from llamafactory_kt.settings.check import check_for_inference

    keys = {"model_name_or_path": str(model), "template": "deepseek", "use_kt": True, "kt_backend": "torch"}
    with pytest.raises(KTConfigError, match="infer_backend: vllm does not work with use_kt"):
        check_for_inference(_parse_infer_args({**keys, "infer_backend": "vllm"})[0])
    check_for_inference(_parse_infer_args({**keys, "kt_cpuinfer": 4, "kt_config": {"kt_num_gpu_experts": 2}})[0])
    for name in ("kt_cpuinfer", "kt_num_gpu_experts"):
        assert f"{name} does nothing with infer_backend: huggingface" in kt_log.text


# The cache.


def test_cache_is_keyed_by_content(build, adapter, model, tmp_path, cache):
    def entry(path: Path) -> Path:
        return Path(build(adapter_name_or_path=str(path)).parsed.lora_paths[0].partition("=")[2]).parent

    first = entry(adapter)
    assert (first / "merged").stat().st_mode & 0o111 == 0o111, "others than root can enter it, too"
    written = (first / "merged" / "adapter_model.safetensors").stat().st_mtime_ns
    copy = shutil.copytree(adapter, tmp_path / "copy")
    assert entry(adapter) == entry(copy) == first, "the same content in another place is the same entry"
    assert (first / "merged" / "adapter_model.safetensors").stat().st_mtime_ns == written, "and is not written again"
    edit_adapter(copy, lambda tensors: {name: tensor + 1 for name, tensor in tensors.items()})
    second = entry(copy)
    assert second != first
    (first / "merged" / "adapter_model.safetensors").write_bytes(b"cut off")
    assert load_file(entry(adapter) / "merged" / "adapter_model.safetensors"), "a damaged entry is made anew"

    shutil.rmtree(copy)
    run = [sys.executable, "-m", "llamafactory_kt", "cache"]
    listed = subprocess.run([*run, "list"], capture_output=True, text=True).stdout
    assert "2 prepared adapter(s)" in listed and "(gone)" in listed
    assert "Removed 1 " in subprocess.run([*run, "clean", "--gone"], capture_output=True, text=True).stdout
    assert not second.exists() and first.exists()
    assert "Removed 1 " in subprocess.run([*run, "clean"], capture_output=True, text=True).stdout
    assert [path.name for path in cache.iterdir()] == [".lock"]


def test_nothing_is_left_of_an_adapter_that_cannot_be_prepared(build, adapter, tmp_path, cache, model, monkeypatch):
    def spoil(tensors):
        next(tensor for name, tensor in tensors.items() if ".experts.3." in name)[0, 0] = float("nan")
        return tensors

    broken = edit_adapter(make_adapter(tmp_path / "broken", model), spoil)
    with pytest.raises(KTAdapterError, match="NaN"):
        build(adapter_name_or_path=str(broken))
    assert [path.name for path in cache.iterdir()] == [".lock"] and adapter_cache.entries() == []
    monkeypatch.setenv("LLAMAFACTORY_KT_CACHE", str(tmp_path / "broken" / "adapter_config.json"))
    with pytest.raises(KTPathError, match=r"cannot be written .* in LLAMAFACTORY_KT_CACHE"):
        build(adapter_name_or_path=str(adapter))


# sglang-kt itself.

CONTRACT = """
import argparse, json, sys
from sglang.srt import server_args
from sglang.srt.server_args import ServerArgs
parser = argparse.ArgumentParser()
ServerArgs.add_cli_args(parser)
answers = []
for words in json.load(sys.stdin):
    arguments = parser.parse_args(words)
    args = object.__new__(ServerArgs)  # __init__ looks for GPUs
    args.__dict__.update({name: field.default for name, field in ServerArgs.__dataclass_fields__.items()})
    args.__dict__.update(vars(arguments))
    try:
        args._validate_kt_expert_lora_max_running_requests()
        args.check_lora_server_args()
        split = None
        if args.lora_paths:
            split = [args.kt_expert_lora_path, args.lora_paths[0].lora_path]
        answers.append({"error": None, "cuda_graph_off": args.disable_cuda_graph, "experts": args.kt_expert_lora_path,
            "split": split, "required": args.kt_composite_lora_name})
    except Exception as error:
        answers.append({"error": str(error)})
print("\\nANSWERS " + json.dumps(answers))
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> tuple[Path, str | None]:
    """A directory for sglang-kt 0.7.2, and why it could not be installed there."""
    target = tmp_path_factory.mktemp("sglang-kt")
    return target, install_sglang_kt(target)


@pytest.fixture
def sglang_kt(installed, record_property) -> Path:
    """sglang-kt itself. Without it, the tests above rely on the recorded facts alone; the summary says which it was."""
    target, reason = installed
    record_property(SGLANG_CONTRACT, "its recorded options alone" if reason else "sglang-kt 0.7.2 itself")
    if reason:
        pytest.skip(f"sglang-kt 0.7.2 could not be installed, only its recorded options were used: {reason}")
    return target


def test_recorded_facts_are_sglang_kts(sglang_kt, tmp_path, recorded):
    found = discover(str(interpreter(tmp_path, sglang_kt)))
    assert found.version == recorded.version and found.architectures == recorded.architectures
    assert found.options == recorded.options


def test_sglang_kt_takes_our_commands_and_adapters(sglang_kt, tmp_path, build, adapter, monkeypatch):
    """Its own parser, validators and splitter, on a matrix of configurations; and it refuses what we refuse."""
    monkeypatch.setenv("SGLANG_KT_LORA_CACHE_DIR", str(tmp_path / "split"))
    experts, rest = experts_only(tmp_path / "e", adapter), rest_only(tmp_path / "r", adapter)
    weights = tmp_path / "int4 weights"
    weights.mkdir()
    plain = build(kt_backend="AMXINT4", kt_weight_path=str(weights), kt_gpu_experts_ratio=0.25)
    alone = build(adapter_name_or_path=str(experts), kt_backend="AMXBF16")
    whole = build(adapter_name_or_path=str(adapter), kt_cpuinfer=8, kt_threadpool_count=1)
    other = build(adapter_name_or_path=str(rest))
    few = [*alone.arguments, "--max-running-requests", "1"]
    raw = [*alone.arguments, "--kt-expert-lora-path", str(adapter)]
    commands = [c.arguments for c in (plain, alone, whole, other)]
    result = subprocess.run(
        [interpreter(tmp_path, sglang_kt), "-c", CONTRACT],
        input=json.dumps([*commands, few, raw]),
        capture_output=True,
        text=True,
    )
    answers = json.loads(result.stdout.rpartition("ANSWERS ")[2])
    assert [answer["error"] for answer in answers[:4]] == [None] * 4, result.stderr
    assert [answer["cuda_graph_off"] for answer in answers[:4]] == [False, True, True, False]
    assert [answer["required"] for answer in answers[:4]] == [None, None, "lora0", None]
    assert [c.adapter.required for c in (plain, alone, whole, other)] == [False, False, True, False]
    assert answers[1]["experts"] == alone.parsed.kt_expert_lora_path and answers[3]["experts"] is None
    ours = load_file(Path(whole.parsed.lora_paths[0].partition("=")[2]) / "adapter_model.safetensors")
    expert_part, rest_part = (load_file(Path(part) / "adapter_model.safetensors") for part in answers[2]["split"])
    assert set(expert_part) == {name for name in ours if ".mlp.experts." in name} and len(expert_part) == 2 * 6 * 3 * 2
    assert {**expert_part, **rest_part}.keys() == ours.keys() and rest_part
    assert "--max-running-requests >= 2" in answers[4]["error"]
    assert "non-expert LoRA tensors" in answers[5]["error"]
