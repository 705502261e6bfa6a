"""Configurations that were written for LLaMA-Factory's own ``use_kt``, of several versions."""

from __future__ import annotations

import dataclasses
import sys

import pytest
from helpers.machines import pretend_problem
from kt_kernel.sft import KTConfig
from llamafactory.hparams.model_args import KTransformersArguments

from llamafactory_kt import KTConfigError
from llamafactory_kt.engines.registry import engines
from llamafactory_kt.settings.keys import KTArguments
from llamafactory_kt.settings.upstream_keys import KEYS

MODEL = {"template": "deepseek", "use_kt": True}
MAIN = {
    "kt_cpu_activation": "retain",
    "kt_config": {
        "kt_expert_weight_format": "bf16", "kt_backend": "AMXBF16", "kt_num_threads": 3, "kt_tp_enabled": False,
        "kt_max_cache_depth": 2, "kt_model_max_length": 2176, "kt_share_backward_bb": True,
    },
}  # fmt: skip
"""as examples/ktransformers/train_lora/qwen3_5moe_lora_sft_kt.yaml of its main branch"""
OF_094 = {
    "infer_backend": "ktransformers", "kt_optimize_rule": "rules/DeepSeek-V2-Lite-Chat-sft-amx.yaml", "cpu_infer": 3,
    "chunk_size": 8192, "mode": "normal",
}  # fmt: skip
"""as LLaMA-Factory 0.9.4's examples/inference/deepseek2_lora_sft_kt.yaml"""


@pytest.fixture(autouse=True)
def any_cpu(monkeypatch):
    pretend_problem(monkeypatch, None, *(engine.name for engine in engines()))


@pytest.fixture
def parse(demo):
    from llamafactory.hparams import get_infer_args

    return lambda keys: get_infer_args({"model_name_or_path": str(demo / "model"), **MODEL, **keys})[0]


def test_the_main_branch(parse, kt_log):
    args = parse(MAIN)
    assert (args.kt_backend, args.kt_num_threads, args.kt_tp_enabled) == ("AMXBF16", 3, False)
    said = [record.getMessage() for record in kt_log.records if "do nothing in a chat" in record.getMessage()]
    idle = "kt_cpu_activation, kt_max_cache_depth, kt_model_max_length, kt_share_backward_bb"
    assert said == [f"{idle}: keys of KTransformers' training and engine, which do nothing in a chat."]


def test_version_0_9_4(parse, kt_log):
    args = parse(OF_094)
    assert (args.kt_num_threads, args.kt_max_chunk, args.infer_backend) == (3, 8192, "huggingface")
    assert "kt_optimize_rule: keys of" in kt_log.text, "the rest has its meaning"


def test_a_file_on_the_command_line(tmp_path, demo, monkeypatch):
    from llamafactory.hparams import get_infer_args

    config = tmp_path / "chat.yaml"
    config.write_text(f"model_name_or_path: {demo / 'model'}\ntemplate: deepseek\nuse_kt: true\ncpu_infer: 3\n")
    monkeypatch.setattr("sys.argv", ["cli", str(config), "kt_cpu_activation=retain"])
    assert get_infer_args()[0].kt_num_threads == 3


@pytest.mark.parametrize("how", ["--{} {}", "--{}={}"])
def test_words_of_the_command_line(demo, monkeypatch, kt_log, how):
    """As in a YAML, beside LLaMA-Factory's own, with JSON, hyphens and flags without a value."""
    model = f"--model_name_or_path {demo / 'model'} --template deepseek --use_kt --temperature -1 --kt-lora-scope all"
    words = [how.format(key, value) for key, value in OF_094.items()]
    words += ["--kt-cpu-activation retain --kt_use_cuda_graph", "--kt_config", '{"kt_tp_enabled":false}']
    monkeypatch.setattr("sys.argv", ["cli", *" ".join([model, *words]).split()])
    from llamafactory.hparams import get_infer_args

    args, *_, generating = get_infer_args()
    assert (args.kt_num_threads, args.kt_max_chunk, args.kt_tp_enabled, generating.temperature) == (3, 8192, False, -1)
    assert "kt_cpu_activation, kt_optimize_rule, kt_use_cuda_graph: keys of" in kt_log.text
    monkeypatch.setattr("sys.argv", [*sys.argv, "--kt_backnd", "AMXBF16", "--mode", "long_context"])
    with pytest.raises(KTConfigError, match=r"(?s)mode: long_context has no.*kt_backnd: unknown key; did you mean"):
        get_infer_args()


def test_misspelt_keys(parse):
    with pytest.raises(KTConfigError, match=r"kt_backnd: unknown key; did you mean kt_backend\?"):
        parse({"kt_backnd": "AMXBF16"})


@pytest.mark.parametrize("of", [KTConfig, KTransformersArguments])
def test_every_key_of_others_is_known(of):
    fields = {field.name for field in dataclasses.fields(of) if field.init} - {
        "kt_wrap_fn",
        "kt_wrap_kwargs",
    }  # of programs
    assert fields <= KEYS | KTArguments.__dataclass_fields__.keys()


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ({"kt_expert_weight_format": "int4"}, "AMXINT4"),
        ({"kt_expert_weight_format": "bf16"}, "auto"),
        ({"kt_expert_weight_format": "rawint4"}, "auto"),
        ({"kt_expert_weight_format": "int4", "kt_backend": "AMXInt4_SFT"}, "AMXINT4"),
        ({"kt_expert_weight_format": "fp8", "kt_backend": "FP8"}, "auto"),
    ],
)
def test_formats_of_the_experts(parse, given, wanted):
    assert parse({"kt_config": given}).kt_backend == parse(given).kt_backend == wanted


def test_int8_with_packed_weights(parse, tmp_path):
    """Whose they are decides the engine."""
    (tmp_path / "_layer_0").mkdir()
    keys = {"kt_weight_path": str(tmp_path), "kt_non_expert_weight_path": str(tmp_path / "cache")}
    for backend in ("auto", "INT8"):
        assert (
            parse({**keys, "kt_config": {"kt_expert_weight_format": "int8", "kt_backend": backend}}).kt_backend
            == "AMXINT8"
        )
    assert parse({**keys, "kt_backend": "int8"}).kt_backend == "AMXINT8"
    (tmp_path / "layer_0").mkdir()
    (tmp_path / "layer_0" / "layer.json").touch()
    for given in ({"kt_backend": "int8"}, {"kt_config": {"kt_expert_weight_format": "int8"}}):
        assert parse({**keys, **given}).kt_backend == "INT8"
    assert parse({**keys, "kt_backend": "AMXInt8"}).kt_backend == "AMXINT8"
    assert parse({"kt_weight_path": str(tmp_path / "layer_0"), "kt_backend": "INT8"}).kt_backend == "INT8", "neither"


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"kt_expert_weight_format": "nvfp4"}, "kt_expert_weight_format: nvfp4 cannot be computed here, expected one of bf16"),
        ({"kt_expert_weight_format": "int8", "kt_backend": "AMXBF16"}, "int8 means kt_backend: AMXINT8, but kt_backend is AMXBF16"),
        ({"kt_expert_weight_format": "bf16", "kt_backend": "AMXINT4"}, "bf16 means kt_backend: auto, but kt_backend is AMXINT4"),
        ({"kt_mode": "long_context"}, "kt_mode: long_context has no meaning in this package. Remove it: attention"),
        ({"kt_force_think": True}, "Use LLaMA-Factory's enable_thinking: true"),
        ({"kt_config": {"enabled": False}}, "Use use_kt: false for a chat without KTransformers"),
        ({"kt_expert_checkpoint_path": "/other"}, "kt_expert_checkpoint_path: the experts are read from model_name_or_path"),
        ({"cpu_infer": 4, "kt_config": {"kt_num_threads": 5}}, "kt_num_threads is 5, but cpu_infer says 4; keep one"),
        ({"cpu_infer": 4, "kt_num_threads": 5}, "kt_num_threads is 5, but cpu_infer says 4; keep one"),
        ({"chunk_size": 4, "kt_config": {"chunk_size": 5}}, "chunk_size is 4, but kt_config says 5; keep one"),
        ({"cpu_infer": 4, "kt_config": "{"}, "kt_config is not valid JSON"),
        ({"cpu_infer": 4, "kt_config": [1]}, "kt_config must be a dictionary"),
    ],
)  # fmt: skip
def test_what_would_change_the_answers_is_refused(parse, keys, message):
    with pytest.raises(KTConfigError) as error:
        parse(keys)
    assert message in str(error.value) and "\n\n" not in str(error.value)


def test_without_use_kt_they_are_left_to_llamafactory(parse):
    with pytest.raises(ValueError, match="chunk_size") as error:
        parse({"use_kt": False, "chunk_size": 4})
    assert not isinstance(error.value, KTConfigError)
