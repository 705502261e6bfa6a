"""Activation: what importing torch loads, in which order modules are hooked, and what happens where that is impossible."""

from __future__ import annotations

import json

import pytest
from helpers.interpreters import CHAT, python

FIELDS = "from llamafactory.hparams import ModelArguments; print('kt_backend' in ModelArguments.__dataclass_fields__)"


@pytest.mark.parametrize(
    "first", ["torch", *(f"llamafactory.{name}" for name in ("model", "hparams.parser", "api.app", "webui.interface", "chat"))]
)  # fmt: skip
def test_whatever_is_imported_first(first):
    """LLaMA-Factory's src/api.py and src/webui.py begin with such imports, which import torch on their way; what they then import by name
    must be ours."""
    code = f"""
        import {first}, sys
        from llamafactory_kt.integration import bootstrap
        print([n for n in bootstrap.TARGETS if n in sys.modules and not bootstrap.is_patched(sys.modules[n])], bootstrap.failures)
        {FIELDS}
        from llamafactory_kt.integration.patching import require_hooks
        require_hooks()
        print("hooked")
    """
    result = python(code)
    assert result.stdout.split()[-4:] == ["[]", "{}", "True", "hooked"], result.stdout + result.stderr


def test_a_module_whose_import_fails():
    code = """
        import sys
        from importlib.machinery import ModuleSpec
        from llamafactory_kt.integration import bootstrap
        spec = ModuleSpec("llamafactory.api.app", None)
        spec._initializing, spec.__class__ = True, bootstrap._PatchingSpec
        spec._initializing = False
        print(type(spec) is ModuleSpec, bootstrap.failures)
    """
    assert python(code).stdout.strip().endswith("True {}")


@pytest.mark.parametrize("switch", ["LLAMAFACTORY_KT_DISABLE", "TORCH_DEVICE_BACKEND_AUTOLOAD"])
def test_switched_off(switch):
    value = "1" if switch == "LLAMAFACTORY_KT_DISABLE" else "0"
    result = python(
        f"import torch, sys; {FIELDS}; print([n for n in sys.modules if 'llamafactory_kt' in n])", **{switch: value}
    )
    printed = result.stdout.split()
    assert printed[0] == "False" and "llamafactory_kt.integration.bootstrap" not in result.stdout, result.stderr


def test_activated_late_by_hand(demo):
    """Without autoload and after LLaMA-Factory was imported, activate() patches the modules that are there."""
    code = f"""
        import llamafactory.chat, llamafactory_kt.integration.bootstrap
        llamafactory_kt.integration.bootstrap.activate(); llamafactory_kt.integration.bootstrap.activate()
        from llamafactory.chat import ChatModel
        model = ChatModel(dict(model_name_or_path={str(demo / "model")!r}, template="deepseek", use_kt=True, kt_backend="torch"))
        from llamafactory_kt.model.state import kt_state
        print(len(kt_state(model.engine.model).wrappers))
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
        "llamafactory_kt.integration",
        "llamafactory_kt.integration.bootstrap",
        "llamafactory_kt.integration.early_interrupt",
    ]
    assert json.loads(result.stdout.replace("'", '"')) == wanted
    assert "llamafactory_kt" not in python("import sys; print(list(sys.modules))").stdout


def test_autoload_never_raises(tmp_path):
    """The package is broken, or gone (an editable install whose source tree was moved): torch works, and one line says
    so."""
    for content in ("raise RuntimeError('broken')", "raise SystemExit(3)", "import nothing_of_that_name"):
        package = tmp_path / "llamafactory_kt"
        package.mkdir(exist_ok=True)
        (package / "__init__.py").write_text(content)
        result = python("import torch; print(torch.ones(1).item())", tmp_path)
        assert result.stdout.strip() == "1.0", result.stderr
        assert result.stderr.count("llamafactory_kt is installed but could not be activated") == 1


def test_fork_in_place_of_stock(tmp_path, demo):
    info = tmp_path / "llamafactory_kt-0.9.6.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: llamafactory-kt\nVersion: 0.9.6.dev0\n")
    model = str(demo / "model")
    code = CHAT.format(model=model, kt=True, more="kt_backend='torch'") + CHAT.format(model=model, kt=False, more="")
    result = python(code, tmp_path)
    assert "KTHookError" in result.stdout and "fork llamafactory-kt 0.9.6.dev0" in result.stdout, (
        result.stdout + result.stderr
    )
    assert result.stdout.strip().endswith("loaded"), "a chat without use_kt"


def test_v1_says_that_it_is_not_hooked(tmp_path, demo):
    config = tmp_path / "c.yaml"
    config.write_text(f"model_name_or_path: {demo / 'model'}\ntemplate: deepseek\nuse_kt: true\n")
    code = f"import sys; sys.argv = ['llamafactory-cli', 'chat', {str(config)!r}]; from llamafactory.cli import main; main()"
    result = python(code, USE_V1="1")
    assert result.returncode == 1 and "Traceback" not in result.stderr, result.stderr[-2000:]
    assert "Error: use_kt: true does not work with USE_V1=1" in result.stderr
