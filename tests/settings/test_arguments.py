"""The kt_* keys: every way of writing them means the same, and all mistakes are reported at once."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
import yaml
from helpers.children import CLI, child
from helpers.machines import pretend_problem
from helpers.places import ROOT
from llamafactory.hparams import ModelArguments
from llamafactory.hparams.parser import _parse_infer_args

from llamafactory_kt import KTConfigError, KTKernelError, KTPathError
from llamafactory_kt.engines import gpus
from llamafactory_kt.engines.registry import engines
from llamafactory_kt.ground.machine import numa_nodes
from llamafactory_kt.integration.chat_config import experts_config
from llamafactory_kt.integration.hparams.parser import take_kt_config
from llamafactory_kt.settings.check import check_for_inference
from llamafactory_kt.settings.keys import KTArguments

EXAMPLES = sorted((ROOT / "examples" / "ktransformers" / "inference").glob("*.yaml"))
MODEL = {"model_name_or_path": "somewhere/model", "template": "deepseek"}


@pytest.fixture(autouse=True)
def any_cpu(monkeypatch):
    pretend_problem(monkeypatch, None, *(engine.name for engine in engines()))


def checked(args):
    if args.use_kt:
        take_kt_config(args)
        check_for_inference(args)
    return args


def parse(keys):
    return checked(_parse_infer_args({**MODEL, **keys})[0])


def test_modelarguments_keeps_its_name_and_its_copy():
    args = checked(ModelArguments(model_name_or_path="m/m", use_kt=True, kt_backend="amxbf16", kt_num_threads="3"))
    assert type(args).__name__ == "ModelArguments" and type(args).__module__ == "llamafactory.hparams.model_args"
    copied = ModelArguments.copyfrom(args, model_name_or_path="other")
    assert (copied.kt_backend, copied.kt_num_threads, copied.model_name_or_path) == ("AMXBF16", 3, "other")
    assert ModelArguments.copyfrom(copied).to_dict()["kt_num_threads"] == 3


@pytest.mark.parametrize(
    ("given", "found"), [("auto", "auto"), ("AUTO", "auto"), (8, 8), ("8", 8), (0, 0), (None, None)]
)
def test_experts_on_the_gpu(monkeypatch, given, found):
    monkeypatch.setattr(gpus, "visible", lambda: [torch.device("cuda", 0)])
    for keys in ({"kt_gpu_experts": given}, {"kt_config": {"kt_gpu_experts": given}}):
        args = parse({"use_kt": True, **keys})
        assert args.kt_gpu_experts == found and experts_config(args).gpu_experts == (found or 0)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"kt_gpu_experts": 8}, "kt_gpu_experts: 8 needs a GPU that PyTorch finds"),
        ({"kt_gpu_experts": -1}, "kt_gpu_experts must be a whole number of at least 0 or auto, found -1"),
        ({"kt_gpu_experts": "some"}, "kt_gpu_experts must be a whole number of at least 0 or auto, found 'some'"),
        ({"kt_gpu_experts_path": "/tmp"}, "kt_gpu_experts_path needs kt_gpu_experts: a number or auto"),
        ({"kt_num_gpu_experts": 8}, "kt_num_gpu_experts: 8 is for infer_backend: sglang; with huggingface, set kt_gpu_experts"),
        ({"kt_gpu_experts_ratio": 0.5}, "kt_gpu_experts_ratio: 0.5 is for infer_backend: sglang"),
        ({"kt_gpu_experts": 8, "infer_backend": "sglang"}, "kt_gpu_experts: 8 is for infer_backend: huggingface; with SGLang, set kt_num_gpu_experts"),
    ],
    ids=str,
)  # fmt: skip
def test_experts_on_no_gpu(monkeypatch, keys, message):
    monkeypatch.setattr(gpus, "visible", list)
    args = ModelArguments(model_name_or_path="m/m", use_kt=True, **keys)
    with pytest.raises(KTConfigError, match=re.escape(message)):
        checked(args)


def test_an_engine_that_leaves_no_experts_to_a_gpu(monkeypatch):
    monkeypatch.setattr(gpus, "visible", lambda: [torch.device("cuda", 0)])
    with pytest.raises(KTKernelError, match="kt_gpu_experts: AMXBF16 cannot leave experts to the GPU"):
        parse({"use_kt": True, "kt_gpu_experts": 8, "kt_backend": "AMXBF16"})


def test_yaml_words_and_flags_alike(tmp_path, monkeypatch):
    yaml = tmp_path / "c.yaml"
    yaml.write_text(
        "model_name_or_path: m/m\nuse_kt: true\nkt_backend: AMXBF16\nkt_num_threads: 4\nkt_tp_enabled: false\n"
    )
    flags = ["--model_name_or_path", "m/m", "--use_kt", "true", "--kt_backend", "AMXBF16", "--kt_num_threads", "4"]
    nested = {"model_name_or_path": "m/m", "use_kt": True, "kt_config": {"kt_backend": "AMXBF16", "kt_num_threads": 4}}
    found = []
    monkeypatch.setattr("sys.argv", ["cli", str(yaml)])
    found.append(_parse_infer_args()[0])
    monkeypatch.setattr("sys.argv", ["cli", str(yaml), "kt_num_threads=4", "kt_backend=amxbf16_sft"])
    found.append(_parse_infer_args()[0])
    monkeypatch.setattr("sys.argv", ["cli", *flags])
    found.append(_parse_infer_args()[0])
    found.append(_parse_infer_args(nested)[0])
    found.append(_parse_infer_args([*flags[:4], "--kt_config", '{"kt_backend": "AMXBF16", "kt_num_threads": 4}'])[0])
    for args in map(checked, found):
        assert (args.use_kt, args.kt_backend, args.kt_num_threads, args.kt_config) == (True, "AMXBF16", 4, None)


@pytest.mark.parametrize(
    ("value", "wanted"),
    [
        ("amxbf16", "AMXBF16"),
        ("AMXBF16_SFT", "AMXBF16"),
        ("AmxBf16_sft", "AMXBF16"),
        ("Torch", "torch"),
        ("AUTO", "auto"),
    ],
)
def test_spellings_of_the_backend(value, wanted):
    assert parse({"use_kt": True, "kt_backend": value}).kt_backend == wanted


def test_packed_weights_go_with_the_backends_that_read_them(tmp_path):
    assert parse({"use_kt": True, "kt_backend": "AMXINT4_SFT"}).kt_weight_path is None
    keys = {"use_kt": True, "kt_backend": "AMXInt8", "kt_weight_path": str(tmp_path)}
    assert parse(keys).kt_backend == "AMXINT8"
    with pytest.raises(
        KTConfigError, match="kt_weight_path is for kt_backend: AMXINT8, AMXINT4, INT8, INT4; with AMXBF16"
    ):
        parse({**keys, "kt_backend": "AMXBF16"})
    with pytest.raises(KTConfigError, match="AMXINT8 needs kt_weight_path; llamafactory-kt quantize"):
        parse({"use_kt": True, "kt_backend": "AMXINT8"})
    with pytest.raises(KTPathError, match=r"kt_weight_path: .*/none does not exist"):
        parse({**keys, "kt_weight_path": str(tmp_path / "none")})


def test_all_mistakes_at_once():
    with pytest.raises(KTConfigError) as error:
        parse(
            {"use_kt": True, "kt_backend": "AMXBF61", "kt_num_threads": "many", "kt_max_chunk": 0, "kt_tp_enabled": "no",
             "kt_lora_scope": "experts", "kt_debug": 1, "kt_threadpool_count": -1, "quantization_bit": 4,
             "kt_config": {"kt_thread": 3}, "adapter_name_or_path": "a,b", "kt_moe_lora_path": "c.pt",
             "use_unsloth": True}
        )  # fmt: skip
    text = str(error.value)
    for part in (
        "kt_thread: unknown key", "kt_backend: unknown value 'AMXBF61'", "did you mean AMXBF16?",
        "kt_num_threads must be a positive whole number or auto, found 'many'", "kt_max_chunk must be a positive",
        "kt_tp_enabled must be true or false", "kt_lora_scope: unknown value 'experts'", "kt_debug must be true or false",
        "kt_threadpool_count must be a positive", "quantization_bit: 4 cannot be combined", "use_unsloth: true cannot",
        "kt_moe_lora_path goes with one adapter, but adapter_name_or_path names 2: a, b",
    ):  # fmt: skip
        assert part in text, part


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"kt_tp_enabled": False, "kt_threadpool_count": 2}, "kt_tp_enabled: false means one sub-pool"),
        ({"kt_num_threads": 1, "kt_threadpool_count": 2}, "kt_num_threads: 1 is fewer than kt_threadpool_count: 2"),
        ({"kt_backend": "torch", "kt_config": {"kt_backend": "AMXBF16"}}, "kt_backend is 'torch', but kt_config says"),
        ({"kt_config": "{"}, "kt_config is not valid JSON"),
        ({"kt_config": [1]}, "kt_config must be a dictionary"),
        (
            {"kt_adapters": "/saves/one"},
            "kt_adapters must be a dictionary of names and adapters, such as {one: /saves/one",
        ),
        ({"kt_adapters": {"a:b": "x"}}, "kt_adapters: 'a:b' is no name; it needs letters, digits"),
        ({"kt_adapters": {1: "x"}}, "kt_adapters: 1 is no name"),
        (
            {"kt_adapters": {"a": 1}},
            "kt_adapters: a must be an adapter's directory, several, or nothing for the model alone; found 1",
        ),
        ({"kt_adapters": {"a": "x,"}}, "kt_adapters: a must be an adapter's directory"),
        (
            {"kt_adapters": {"model": "/tmp"}},
            "kt_adapters: model is the model's own name, which stands for adapter_name_or_path",
        ),
        ({"kt_adapters": {"a": "/tmp"}, "kt_merge_adapter": True}, "but kt_merge_adapter: true merges one into them"),
        ({"kt_adapters": {"a": "/tmp"}, "kt_backend": "AVX2BF16"}, "but kt_backend: AVX2BF16 merges one into them"),
    ],
)
def test_combinations(keys, message):
    with pytest.raises(KTConfigError) as error:
        parse({"use_kt": True, **keys})
    assert message in str(error.value)


def test_adapters_to_choose_from(tmp_path, monkeypatch):
    """In a YAML, on its command line, in JSON and in kt_config; with hub ids left to the load."""
    (yaml := tmp_path / "c.yaml").write_text(
        "model_name_or_path: m/m\nuse_kt: true\nkt_adapters:\n  one: /tmp\n  base:\n"
    )
    monkeypatch.setattr("sys.argv", ["cli", str(yaml), f"kt_adapters.two=/tmp,{tmp_path}"])
    wanted = {"one": ["/tmp"], "base": [], "two": ["/tmp", str(tmp_path)]}
    given = {"one": "/tmp", "base": None, "two": ["/tmp", str(tmp_path)]}
    words = ["--model_name_or_path", "m/m", "--use_kt", "true", "--kt_adapters", json.dumps(given)]
    for args in (_parse_infer_args()[0], _parse_infer_args(words)[0]):
        assert checked(args).kt_adapters == wanted and experts_config(args).choices == wanted
    assert parse({"use_kt": True, "kt_config": {"kt_adapters": given}}).kt_adapters == wanted
    assert parse({"use_kt": True}).kt_adapters == {}
    with pytest.raises(KTPathError, match=r"kt_adapters: two: /nowhere/x does not exist\.$"):
        parse({"use_kt": True, "kt_adapters": {"one": "/tmp", "two": "/tmp,/nowhere/x", "hub": "some/adapter"}})


def test_training_keys_are_taken_along_with_a_word(kt_log):
    nested = {"kt_backend": "AMXBF16", "kt_share_backward_bb": True, "kt_lora_rank": 8, "kt_num_gpu_experts": 0}
    assert parse({"use_kt": True, "kt_config": nested}).kt_backend == "AMXBF16"
    assert "kt_lora_rank, kt_share_backward_bb: keys of KTransformers' training" in kt_log.text


def test_training_configurations_are_left_alone():
    """use_kt in a training YAML is LLaMA-Factory's own; nothing of ours runs until a chat asks for it."""
    keys = {"use_kt": True, "kt_backend": "nonsense", "adapter_name_or_path": "a,b"}
    assert _parse_infer_args({**MODEL, **keys})[0].kt_backend == "nonsense"


def test_nothing_is_checked_without_use_kt():
    assert parse({"kt_backend": "nonsense", "kt_num_threads": -3}).kt_backend == "nonsense"


def test_more_sub_pools_than_the_machine_has(demo, caplog):
    """LLaMA-Factory's own examples ask for two, which changes no answer."""
    args = parse({"model_name_or_path": str(demo / "model"), "use_kt": True, "kt_threadpool_count": 99})
    assert args.kt_threadpool_count == len(numa_nodes())
    assert "99 sub-pools asked for" in caplog.text


def test_help_shows_the_keys():
    text = child(CLI, "chat", "-h").stdout
    for name in KTArguments.__dataclass_fields__:
        assert f"--{name}" in text


@pytest.mark.parametrize("example", EXAMPLES, ids=[path.stem for path in EXAMPLES])
def test_example_configurations_are_understood(example, tmp_path):
    """With the places that they name, /models and /saves, in another directory."""
    values = yaml.safe_load(example.read_text(encoding="utf-8"))
    for key, value in values.items():
        if isinstance(value, str) and value.startswith("/"):
            values[key] = f"{tmp_path}{value}"
            Path(values[key]).mkdir(parents=True)
    args = parse(values)
    assert args.use_kt and args.kt_backend == "auto"
    assert ("lora" in example.stem) == bool(args.adapter_name_or_path)
