"""A LLaMA-Factory that differs from the one that the hooks were written for.

Hooks are set right after a module was executed, so only a wrapper around the private ``_patch`` can change the module
before.
"""

from __future__ import annotations

import textwrap
from importlib.metadata import version

import pytest
from helpers.children import child
from helpers.interpreters import CHAT


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
    """use_kt fails and names the function, what was found, what was expected, and the versions."""
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
    plain = CHAT.format(model=str(demo / "model"), kt=False, more="")
    result = child(code + textwrap.dedent(plain))
    assert "KTHookError" in result.stdout, result.stdout + result.stderr
    for part in (
        named,
        "expected",
        "Installed: llamafactory ",
        f"transformers {version('transformers')}",
        "llamafactory-kt-experts",
    ):
        assert part in result.stdout
    assert result.stdout.strip().endswith("loaded"), "a chat without use_kt"


def test_changed_sglang_engine(demo):
    """Only a chat that asks for SGLang needs this hook."""
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
    result = child(
        textwrap.dedent(code) + textwrap.dedent(chat) + textwrap.dedent(chat.replace("huggingface", "sglang"))
    )
    assert "KTHookError llamafactory.chat.sglang_engine.SGLangEngine cannot be hooked" in result.stdout, result.stderr
    assert "loaded" in result.stdout.splitlines(), result.stdout


def test_changed_pages(tmp_path, demo):
    """LlamaBoard opens without our section; use_kt among its extra arguments gives the error."""
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
    result = child(textwrap.dedent(code) + textwrap.dedent(chat))
    assert "['chatter', 'infer']" in result.stdout, result.stdout + result.stderr
    assert "KTHookError WebChatModel.load_model cannot be hooked" in result.stdout
