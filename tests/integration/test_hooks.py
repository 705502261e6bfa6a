"""Activation: what is hooked, what happens where it cannot be, and that nothing changes for those who do not ask."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from tiny import make_model

ROOT = Path(__file__).parents[1]


def python(code: str, *path: Path, **environment: str) -> subprocess.CompletedProcess:
    inherited = filter(None, [os.environ.get("PYTHONPATH")])
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([*map(str, path), *inherited]), **environment}
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, env=env, cwd="/", timeout=300
    )


FIELDS = "from llamafactory.hparams import ModelArguments; print('kt_backend' in ModelArguments.__dataclass_fields__)"


@pytest.mark.parametrize("first", ["llamafactory.chat", "llamafactory.model", "llamafactory.hparams.parser", "torch"])
def test_whatever_is_imported_first(first):
    result = python(
        f"import {first}; {FIELDS}; from llamafactory_kt.integration.patching import require_hooks; require_hooks()"
    )
    assert result.stdout.strip().endswith("True"), result.stderr


@pytest.mark.parametrize("switch", ["LLAMAFACTORY_KT_DISABLE", "TORCH_DEVICE_BACKEND_AUTOLOAD"])
def test_switched_off(switch):
    value = "1" if switch == "LLAMAFACTORY_KT_DISABLE" else "0"
    result = python(
        f"import torch, sys; {FIELDS}; print([n for n in sys.modules if 'llamafactory_kt' in n])", **{switch: value}
    )
    printed = result.stdout.split()
    assert printed[0] == "False" and "llamafactory_kt.integration.bootstrap" not in result.stdout, result.stderr


def test_activated_late_by_hand(demo):
    """Autoload off, LLaMA-Factory imported already: activate() patches what is there."""
    code = f"""
        import llamafactory.chat, llamafactory_kt.integration.bootstrap
        llamafactory_kt.integration.bootstrap.activate(); llamafactory_kt.integration.bootstrap.activate()
        from llamafactory.chat import ChatModel
        model = ChatModel(dict(model_name_or_path={str(demo / "model")!r}, template="deepseek", use_kt=True, kt_backend="torch"))
        print(len(model.engine.model._kt_wrappers))
    """
    result = python(code, TORCH_DEVICE_BACKEND_AUTOLOAD="0")
    assert result.stdout.strip().endswith("3"), result.stderr


def test_import_torch_brings_in_next_to_nothing():
    code = "import torch, sys; print(sorted(n for n in sys.modules if 'llamafactory' in n or n in ('yaml', 'transformers', 'peft', 'rich')))"
    result = python(code)
    wanted = [
        "_llamafactory_kt_autoload",
        "llamafactory_kt",
        "llamafactory_kt._version",
        "llamafactory_kt.integration.bootstrap",
    ]
    assert json.loads(result.stdout.replace("'", '"')) == wanted
    assert "llamafactory_kt" not in python("import sys; print(list(sys.modules))").stdout


def test_autoload_never_raises(tmp_path):
    """The package is broken, or gone (an editable install whose source tree moved): one line, and torch works."""
    for content in ("raise RuntimeError('broken')", "raise SystemExit(3)", "import nothing_of_that_name"):
        package = tmp_path / "llamafactory_kt"
        package.mkdir(exist_ok=True)
        (package / "__init__.py").write_text(content)
        result = python("import torch; print(torch.ones(1).item())", tmp_path)
        assert result.stdout.strip() == "1.0", result.stderr
        assert result.stderr.count("llamafactory_kt is installed but could not be activated") == 1


CHAT = """
    from llamafactory.chat import ChatModel
    try:
        ChatModel(dict(model_name_or_path={model!r}, template="deepseek", use_kt={kt}, {more}))
        print("loaded")
    except Exception as error:
        print(type(error).__name__, error)
"""


@pytest.mark.parametrize(
    ("module", "change", "named"),
    [
        ("llamafactory.model.loader", "module.patch_config = lambda config, something_new: None", "llamafactory.model.loader.patch_config"),
        ("llamafactory.model.loader", "del module.init_adapter", "found nothing of that name"),
        ("llamafactory.hparams.parser", "module._check_extra_dependencies = lambda: None", "llamafactory.hparams.parser._check_extra_dependencies"),
        ("llamafactory.hparams.model_args", "module.ModelArguments = int", "llamafactory.hparams.model_args.ModelArguments"),
    ],
)  # fmt: skip
def test_changed_llamafactory(demo, module, change, named):
    """Another LLaMA-Factory: use_kt fails with function, found, expected and versions."""
    code = f"""
    import llamafactory_kt.integration.bootstrap as bootstrap
    stock_patch = bootstrap._patch
    def patch(module):
        if module.__name__ == {module!r}:
            saved = dict(vars(module))
            {change}
            stock_patch(module)
            vars(module).update({{k: v for k, v in saved.items() if k not in ("get_infer_args",)}})
        else:
            stock_patch(module)
    bootstrap._patch = patch
    """
    code = textwrap.dedent(code) + textwrap.dedent(
        CHAT.format(model=str(demo / "model"), kt=True, more="kt_backend='torch'")
    )
    result = python(code)
    assert "KTHookError" in result.stdout, result.stdout + result.stderr
    for part in (named, "expected", "llamafactory 0.9.5", "transformers 5.6", "llamafactory-kt-experts"):
        assert part in result.stdout
    plain = python(code.replace("use_kt=True, kt_backend='torch'", "use_kt=False"))
    assert plain.stdout.strip().endswith("loaded"), plain.stdout + plain.stderr


def test_changed_sglang_engine(demo):
    """Only a chat that asks for SGLang needs its hook."""
    code = """
    import llamafactory_kt.integration.bootstrap as bootstrap
    stock_patch = bootstrap._patch
    def patch(module):
        if module.__name__ == "llamafactory.chat.sglang_engine":
            module.SGLangEngine = lambda model_args: None
        stock_patch(module)
    bootstrap._patch = patch
    """
    chat = CHAT.format(model=str(demo / "model"), kt=True, more="kt_backend='torch', infer_backend='huggingface'")
    code = textwrap.dedent(code) + textwrap.dedent(chat)
    assert python(code).stdout.strip().endswith("loaded")
    result = python(code.replace("infer_backend='huggingface'", "infer_backend='sglang'"))
    assert "KTHookError llamafactory.chat.sglang_engine.SGLangEngine cannot be hooked" in result.stdout, result.stderr


def test_changed_pages(tmp_path, demo):
    """LlamaBoard opens without our section, and use_kt in its extra arguments ends in the error."""
    code = f"""
    import llamafactory_kt.integration.bootstrap as bootstrap
    stock_patch = bootstrap._patch
    def patch(module):
        if module.__name__ == "llamafactory.webui.chatter":
            stock, module.WebChatModel.load_model = module.WebChatModel.load_model, lambda self: None
            stock_patch(module)
            module.WebChatModel.load_model = stock
        else:
            stock_patch(module)
    bootstrap._patch = patch
    import os
    os.chdir({str(tmp_path)!r})
    from llamafactory.webui.interface import create_ui
    create_ui()
    print([name.rpartition(".")[2] for name in bootstrap.failures])
    """
    chat = CHAT.format(model=str(demo / "model"), kt=True, more="kt_backend='torch'")
    result = python(textwrap.dedent(code) + textwrap.dedent(chat))
    assert "['chatter', 'infer']" in result.stdout, result.stdout + result.stderr
    assert "KTHookError WebChatModel.load_model cannot be hooked" in result.stdout


def test_fork_in_place_of_stock(tmp_path, demo):
    info = tmp_path / "llamafactory_kt-0.9.6.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: llamafactory-kt\nVersion: 0.9.6.dev0\n")
    code = CHAT.format(model=str(demo / "model"), kt=True, more="kt_backend='torch'")
    result = python(code, tmp_path)
    assert "KTHookError" in result.stdout and "fork llamafactory-kt 0.9.6.dev0" in result.stdout, (
        result.stdout + result.stderr
    )
    plain = python(CHAT.format(model=str(demo / "model"), kt=False, more=""), tmp_path)
    assert plain.stdout.strip().endswith("loaded"), plain.stdout + plain.stderr


def test_v1_says_that_it_is_not_hooked(tmp_path, demo):
    config = tmp_path / "c.yaml"
    config.write_text(f"model_name_or_path: {demo / 'model'}\ntemplate: deepseek\nuse_kt: true\n")
    code = f"import sys; sys.argv = ['llamafactory-cli', 'chat', {str(config)!r}]; from llamafactory.cli import main; main()"
    result = python(code, USE_V1="1")
    assert result.returncode == 1 and "Traceback" not in result.stderr, result.stderr[-2000:]
    assert "Error: use_kt: true does not work with USE_V1=1" in result.stderr


LOGITS = """
    import torch
    from llamafactory.chat import ChatModel
    model = ChatModel(dict(model_name_or_path={model!r}, template="deepseek", infer_dtype="float32")).engine.model
    with torch.inference_mode():
        print(model(input_ids=torch.arange(2, 30)[None]).logits.double().sum().item())
"""


def test_plain_chat_is_unchanged(demo):
    code = LOGITS.format(model=str(demo / "model"))
    hooked, stock = python(code), python(code, LLAMAFACTORY_KT_DISABLE="1")
    assert hooked.stdout.splitlines()[-1] == stock.stdout.splitlines()[-1], hooked.stderr


def train(tmp_path: Path, model: Path, use_kt: bool = False, **environment: str) -> subprocess.CompletedProcess:
    data = tmp_path / "data"
    data.mkdir(exist_ok=True)
    rows = [{"instruction": f"question {n}", "input": "", "output": f"answer {n}"} for n in range(8)]
    (data / "rows.json").write_text(json.dumps(rows))
    (data / "dataset_info.json").write_text(json.dumps({"rows": {"file_name": "rows.json"}}))
    output = tmp_path / f"out{len(list(tmp_path.iterdir()))}"
    arguments = {
        "stage": "sft", "do_train": True, "finetuning_type": "lora", "lora_rank": 4, "lora_target": "q_proj,v_proj",
        "model_name_or_path": str(model), "dataset": "rows", "dataset_dir": str(data), "template": "deepseek",
        "output_dir": str(output), "max_steps": 2, "per_device_train_batch_size": 2, "cutoff_len": 64, "seed": 1,
        "report_to": "none", "logging_steps": 1, "learning_rate": 0.01, "use_cpu": True, "use_kt": use_kt,
        "overwrite_cache": True, "preprocessing_num_workers": 1,
    }  # fmt: skip
    return python(
        f"""
        from llamafactory.train.tuner import run_exp
        run_exp({arguments!r})
        import json
        print(json.dumps([r["loss"] for r in json.load(open({str(output)!r} + "/trainer_state.json"))["log_history"] if "loss" in r]))
        """,
        **environment,
    )


def test_training_is_unchanged(tmp_path):
    model = make_model(tmp_path / "model", "qwen3_moe")
    hooked, stock = train(tmp_path, model), train(tmp_path, model, LLAMAFACTORY_KT_DISABLE="1")
    assert hooked.returncode == stock.returncode == 0, hooked.stderr[-3000:]
    losses = json.loads(hooked.stdout.splitlines()[-1])
    assert len(losses) == 2 and losses == json.loads(stock.stdout.splitlines()[-1])
    refused = [train(tmp_path, model, use_kt=True, **env) for env in ({}, {"LLAMAFACTORY_KT_DISABLE": "1"})]
    assert all("transformers-kt" in result.stderr for result in refused), (
        "training with use_kt is LLaMA-Factory's own affair"
    )


def test_auto_classes_are_told_apart_without_importing_all(demo):
    """As the lists say it, for every configuration of transformers and one of the same name from elsewhere."""
    code = f"""
        import sys
        from llamafactory.chat import ChatModel
        from transformers import AutoModelForCausalLM
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING
        from llamafactory_kt.integration import auto_classes
        keys = dict(model_name_or_path={str(demo / "model")!r}, template="deepseek", use_kt=True, kt_backend="torch")
        ChatModel(keys)
        print(len([name for name in sys.modules if ".configuration_" in name and "transformers.models." in name]))
        import transformers
        mappings = [getattr(transformers, name)._model_mapping for name in auto_classes.AUTO_CLASSES]
        every = list(dict.fromkeys(CONFIG_MAPPING[kind] for kind in CONFIG_MAPPING))
        every += [type(config.__name__, (), {{}}) for config in every]
        for mapping in mappings:
            listed = type(mapping).keys(mapping)
            assert list(mapping) == list(mapping.keys()) == listed and len(mapping.keys()) == len(listed) > 2
            assert [config for config in every if config in mapping.keys()] == [config for config in every if config in listed]
        new = type("NewConfig", (transformers.PretrainedConfig,), {{"model_type": "new"}})
        assert new not in mappings[0].keys()
        mappings[0].register(new, transformers.LlavaForConditionalGeneration)
        assert new in mappings[0].keys() and "keys" not in vars(AutoModelForCausalLM._model_mapping)
        print("ok")
    """
    result = python(code)
    imported, ok = result.stdout.split()[-2:]
    assert ok == "ok", result.stderr
    assert int(imported) < 30, "LLaMA-Factory's own imports bring in a few"
