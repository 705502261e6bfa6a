"""What is refused before a server is started."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from helpers.adapters import edit_adapter, make_adapter
from helpers.models import make_model

from llamafactory_kt import KTAdapterError, KTConfigError, KTError, KTModelError


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"kt_backend": "torch"}, "kt_backend: torch is an engine of infer_backend: huggingface"),
        ({"kt_backend": "oneDNN"}, "kt_backend: oneDNN is an engine of infer_backend: huggingface"),
        ({"kt_backend": "AMXINT4", "kt_method": "BF16", "kt_weight_path": "/tmp"}, "is contradictory: kt_method: BF16"),
        ({"kt_method": "AMXINT9"}, "kt_method: unknown value 'AMXINT9'"),
        ({"kt_weight_path": "/tmp"}, "but not in which format: add kt_method"),
        ({"kt_weight_path": "/nowhere", "kt_method": "AMXINT8"}, "kt_weight_path: /nowhere does not exist"),
        ({"kt_method": "AMXINT4"}, "AMXINT4 needs kt_weight_path, .* llamafactory-kt quantize --method amxint4 writes it"),
        ({"kt_num_threads": 4, "kt_cpuinfer": 5}, "kt_num_threads is 4, but kt_cpuinfer 5"),
        ({"kt_num_gpu_experts": 1, "kt_gpu_experts_ratio": 0.1}, "say the same in two ways"),
        ({"kt_gpu_experts_ratio": 2}, "kt_gpu_experts_ratio must be a number of at least 0 and at most 1, found 2"),
        ({"kt_lora_scope": "attention"}, "kt_lora_scope: attention works with infer_backend: huggingface only"),
        ({"kt_moe_lora_rank": 8}, "kt_moe_lora_rank: there is no adapter"),
        ({"kt_sglang_python": "/nowhere/python"}, "kt_sglang_python must be the path of a Python interpreter"),
        ({"sglang_config": {"max_runing_requests": 4}}, "no option --max-runing-requests .did you mean --max-running-requests"),
        ({"sglang_lora_backend": "flashinfer", "adapter_name_or_path": "ADAPTER"}, "invalid choice: 'flashinfer'"),
        ({"adapter_name_or_path": "ADAPTER,ADAPTER"}, "SGLang with KT serves one adapter, found 2"),
        ({"kt_adapters": {"one": "/tmp"}}, "kt_adapters works with infer_backend: huggingface only"),
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
    with pytest.raises(KTModelError, match="SGLang with KT finds no routed experts"):
        build(model=_with_config(tmp_path / "n", model, n_routed_experts=None))
    other = make_model(tmp_path / "other", "qwen3_moe")
    with pytest.raises(KTAdapterError):
        build(model=other, adapter_name_or_path=str(adapter))
    gelu = make_model(tmp_path / "gelu", "qwen3_moe", hidden_act="gelu")
    with pytest.raises(
        KTModelError, match=r"computes down\(silu\(gate x\) \* up x\) alone, but the model's experts are down\(gelu"
    ):
        build(model=gelu, adapter_name_or_path=str(make_adapter(tmp_path / "gelu-adapter", gelu)))
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


def _with_config(directory: Path, model: Path, **changes) -> Path:
    directory.mkdir()
    config = {**json.loads((model / "config.json").read_text()), **changes}
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def test_other_backends_stay_refused_and_serving_keys_do_nothing_there(kt_log, model):
    from llamafactory.hparams import get_infer_args

    keys = {"model_name_or_path": str(model), "template": "deepseek", "use_kt": True, "kt_backend": "torch"}
    with pytest.raises(KTConfigError, match="infer_backend: vllm does not work with use_kt"):
        get_infer_args({**keys, "infer_backend": "vllm"})
    get_infer_args({**keys, "kt_cpuinfer": 4, "kt_config": {"kt_max_deferred_experts_per_token": 2}})
    for name in ("kt_cpuinfer", "kt_max_deferred_experts_per_token"):
        assert f"{name} does nothing with infer_backend: huggingface" in kt_log.text
