"""``llamafactory-kt doctor`` in this environment, and in broken ones: a scratch directory at the front of PYTHONPATH
shadows a package or its metadata."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from helpers.adapters import edit_adapter, make_adapter
from helpers.marks import needs_native
from helpers.models import make_model
from helpers.places import ROOT
from typer.testing import CliRunner

from llamafactory_kt.cli import app
from llamafactory_kt.ground.errors import KTError
from llamafactory_kt.ground.machine import missing_cpu_flags
from llamafactory_kt.tools.doctor import Status, diagnose, machine
from llamafactory_kt.tools.doctor.environment import variables
from llamafactory_kt.tools.quantize import quantize_model

DISTURBING = ("TORCH_DEVICE_BACKEND_AUTOLOAD", "LLAMAFACTORY_KT_DISABLE", "USE_V1", "KT_KERNEL_CPU_VARIANT")


def doctor(*arguments, first: Path | None = None, **environment: str) -> tuple[int, dict[str, dict]]:
    """Exit status, and subject -> finding."""
    path = os.pathsep.join(map(str, [*([first] if first else []), ROOT]))
    env = {k: v for k, v in os.environ.items() if k not in DISTURBING and not k.startswith(("KMP_", "OMP_"))}
    result = subprocess.run(
        [sys.executable, "-m", "llamafactory_kt", "doctor", *map(str, arguments), "--json"],
        capture_output=True, text=True, env={**env, "PYTHONPATH": path, **environment}, timeout=300,
    )  # fmt: skip
    content = json.loads(result.stdout)
    assert content["error"] == sum(f["status"] == "error" for f in content["findings"])
    return result.returncode, {finding["subject"]: finding for finding in content["findings"]}


def shadow(directory: Path, distribution: str, version: str, *files: str) -> None:
    """Metadata that says this distribution installed these files; Python 3.12 believes that of files that exist."""
    info = directory / f"{distribution.replace('-', '_')}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n")
    (info / "RECORD").write_text("".join(f"{file},,\n" for file in files))
    for file in map(directory.joinpath, files):
        file.parent.mkdir(exist_ok=True)
        file.touch()


def write(path: Path, **keys) -> Path:
    path.write_text(yaml.safe_dump({"template": "deepseek", "use_kt": True, "kt_backend": "torch", **keys}))
    return path


def test_a_healthy_environment(tmp_path, demo):
    config = write(
        tmp_path / "c.yaml", model_name_or_path=str(demo / "model"), adapter_name_or_path=str(demo / "adapter")
    )
    status, found = doctor(config)
    assert status == 0, [f for f in found.values() if f["status"] == "error"]
    assert found["llamafactory"]["text"] == f"{version('llamafactory')} (<=0.9.6.dev0,>=0.9.5)"
    assert found["import kt_kernel"]["status"] == "ok"
    assert found["native kernels"]["text"]
    assert "3 layers of 8 routed experts (128 x 96), 2 per token" in found["model"]["text"]
    assert "56 tensors to PEFT, 144 to the experts; expert LoRA in 3 layers" in found["adapter"]["text"]
    assert found["experts"]["text"].startswith("layers 1, 2, 3 on the CPU; torch with ")
    assert "experts 1.7 MiB, their LoRA 0.2 MiB" in found["CPU memory"]["text"]
    assert found["hooks"]["status"] == "ok"


def test_kernel_absent_fork_over_stock_and_wrong_torchaudio(tmp_path):
    (tmp_path / "kt_kernel.py").write_text("raise ModuleNotFoundError(\"No module named 'kt_kernel'\")")
    shadow(tmp_path, "transformers-kt", "5.6.0", "transformers/fork.py")  # no __init__.py: the real one is imported
    (tmp_path / "torchaudio").mkdir()
    (tmp_path / "torchaudio" / "__init__.py").write_text("raise OSError('_torchaudio.so:\\n undefined symbol: aoti')")
    shadow(tmp_path, "torchaudio", "2.11.0", "torchaudio/__init__.py")
    status, found = doctor(first=tmp_path, KMP_AFFINITY="compact", KT_KERNEL_CPU_VARIANT="avx2")
    assert status == 1
    assert "No module named 'kt_kernel'" in found["import kt_kernel"]["text"]
    assert found["import kt_kernel"]["advice"].endswith('"kt-kernel<0.8,>=0.7.2"')
    assert found["engines"]["status"] == "warning"
    because = "this CPU lacks" if missing_cpu_flags() else "kt-kernel is not"
    assert f"torch; no AMXBF16: {because}" in found["engines"]["text"]
    assert found["package transformers"]["status"] == "error"
    assert "installed by transformers-kt" in found["package transformers"]["text"]
    assert "pip uninstall -y transformers-kt" in found["package transformers"]["advice"]
    assert found["torchaudio"]["text"].startswith("2.11.0 is outside of <2.11,>=2.9.1")
    assert found["import torchaudio"]["text"] == "OSError: _torchaudio.so: undefined symbol: aoti"
    assert found["KMP_AFFINITY"]["status"] == found["KT_KERNEL_CPU_VARIANT"]["status"] == "warning"
    assert found["import torch"]["status"] == "ok"
    assert "_torchaudio.so" in found["hooks"]["text"], "LLaMA-Factory's chat imports torchaudio"


def test_without_torch(tmp_path, demo):
    (tmp_path / "torch.py").write_text("raise ImportError('libtorch_cpu.so: cannot open shared object file')")
    status, found = doctor(write(tmp_path / "c.yaml", model_name_or_path=str(demo / "model")), first=tmp_path)
    assert status == 1 and found["import torch"]["text"].startswith("ImportError: libtorch_cpu.so")
    assert found["CPU"]["text"] and found["memory"]["text"] and "hooks" not in found
    assert "was not looked at" in found["configuration"]["text"]


def test_a_kernel_that_ends_the_process(tmp_path, demo):
    """As a build for another CPU does. The other libraries are still examined."""
    (tmp_path / "kt_kernel.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGILL)")
    config = write(tmp_path / "c.yaml", model_name_or_path=str(demo / "model"))
    status, found = doctor(config, first=tmp_path, TORCH_DEVICE_BACKEND_AUTOLOAD="0")
    assert status == 1 and found["import kt_kernel"]["text"] == "ends the process (SIGILL)"
    assert found["import llamafactory"]["status"] == "ok" and found["configuration"]["status"] == "error"
    assert found["hooks"]["text"] == "not registered at `import torch`"
    assert found["TORCH_DEVICE_BACKEND_AUTOLOAD"]["status"] == "error"


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return make_model(tmp_path_factory.mktemp("model"), "deepseek_v2")


@pytest.fixture
def look(tmp_path, monkeypatch):
    """Findings about a YAML, in this process, whose imports are known to work."""
    from llamafactory_kt.tools.doctor import packages

    monkeypatch.setattr(packages, "try_imports", lambda: packages.Imports({}, frozenset()))

    def findings(*overrides, **keys) -> dict[str, object]:
        every = diagnose(write(tmp_path / "c.yaml", **keys), overrides)
        findings.texts = [f.text for f in every if f.status is Status.ERROR]
        return {f.subject: f for f in every}

    return findings


def test_native_kernels(monkeypatch):
    from llamafactory_kt.native import library

    def finding(found):
        monkeypatch.setattr(library, "library", lambda: found)
        (only,) = machine.native_kernels()
        return only

    none = finding("the native kernels were not built")
    assert none.status is Status.WARNING and none.text.endswith("not built") and "install a C++ compiler" in none.advice
    kernels = SimpleNamespace(kt_in_use=lambda: b"avx2", kt_instruction_sets=lambda: b"avx512,avx2")
    monkeypatch.delenv(library.VARIABLE, raising=False)
    assert finding(kernels).text == "avx2; this CPU has avx512, avx2"
    monkeypatch.setenv(library.VARIABLE, "avx2")
    assert finding(kernels).text == "avx2, chosen by LLAMAFACTORY_KT_ISA; this CPU has avx512, avx2"


def test_configurations_with_mistakes(look, tmp_path, model, monkeypatch):
    found = look(model_name_or_path=str(model), kt_bakend="torch")["configuration"]
    assert found.status is Status.ERROR and "kt_bakend" in found.text and "\n" not in found.text
    look("kt_num_threads=0", model_name_or_path=str(tmp_path / "none"))
    assert "kt_num_threads must be" in look.texts[0] and "model_name_or_path" in look.texts[1]
    found = look(model_name_or_path=str(model), use_kt=False)["configuration"]
    assert found.status is Status.WARNING and "use_kt" in found.text
    (tmp_path / "bad.yaml").write_text("a: [1")
    assert "is not valid YAML" in {f.subject: f for f in diagnose(tmp_path / "bad.yaml")}["configuration"].text


def test_models_and_adapters_that_do_not_fit(look, tmp_path, model, monkeypatch):
    other = make_model(tmp_path / "other", "deepseek_v2", n_routed_experts=5)
    adapter = make_adapter(tmp_path / "adapter", model)
    found = look(model_name_or_path=str(other), adapter_name_or_path=str(adapter))["adapter"]
    assert found.status is Status.ERROR and "the model has 5 experts" in found.text
    edit_adapter(adapter, lambda t: {n.replace("q_proj", "x_proj"): v for n, v in t.items()})
    found = look(model_name_or_path=str(model), adapter_name_or_path=str(adapter))["adapter"]
    assert "belong to no module" in found.text
    found = look(model_name_or_path=str(model), kt_adapters={"one": str(adapter), "none": None})
    assert "belong to no module" in found["adapter one"].text
    without = make_adapter(tmp_path / "without", model, skip_layers=(0, 1, 2))
    found = look(model_name_or_path=str(model), adapter_name_or_path=str(without))["adapter"]
    assert found.status is Status.WARNING and "0 to the experts" in found.text
    (other / "model.safetensors").write_bytes(b"x" * 100)
    assert "cannot be read as safetensors" in look(model_name_or_path=str(other))["checkpoint"].text
    monkeypatch.setattr("llamafactory_kt.model.memory.available_memory", lambda: 1000)
    found = look(model_name_or_path=str(model), kt_load="copy")["CPU memory"]
    assert found.status is Status.ERROR and "1000" not in found.text and "1.0 KiB are free" in found.text


def test_what_a_chat_would_end_with(look, tmp_path, model):
    """Each is one error before anything is loaded, in a chat too."""
    from llamafactory_kt.integration.chat import LoadedChat

    def problem(subject: str, **keys) -> str:
        found = look(**{"model_name_or_path": str(model), **keys})[subject]
        assert found.status is Status.ERROR and "\n" not in found.text and "docs/" not in found.advice
        values = yaml.safe_load((tmp_path / "c.yaml").read_text())
        with pytest.raises(KTError) as stopped:
            LoadedChat.load(values)
        assert str(stopped.value) in found.text
        return found.text

    text = problem("configuration", tempalte="qwen", max_new_token=5, kt_bakend="torch")
    assert all(
        hint in text for hint in ("did you mean template?", "did you mean max_new_tokens?", "did you mean kt_backend?")
    )
    assert "did you mean deepseek3?" in problem("configuration", template="deepsek3")
    assert re.search(r" It has .*\balpaca, ", problem("configuration", template="xyzzy"))
    text = problem("configuration", temperature="hot", do_sample="no")
    assert text.endswith("do_sample must be true or false, found 'no'. temperature must be a number, found 'hot'.")
    text = problem("template", template="qwen")
    assert "template: qwen puts '<|im_end|>' into prompts" in text and "(it has 1024)" in text
    gguf = tmp_path / "gguf"
    gguf.mkdir()
    (gguf / "model-Q4_K_M.gguf").write_bytes(b"GGUF")
    assert "Download the model's own repository" in problem("model", model_name_or_path=str(gguf))


def test_all_mistakes_are_found_at_once(look, tmp_path, model):
    """One run; what is wrong with a key does not hide what is wrong with a file."""
    adapter = make_adapter(tmp_path / "adapter", make_model(tmp_path / "other", "deepseek_v2", n_routed_experts=9))
    look(
        model_name_or_path=str(model), adapter_name_or_path=[str(adapter), str(tmp_path / "none")], tempalte="x", do_train=True,
        template="deepsek3", kt_num_threads=0,
    )  # fmt: skip
    wanted = [
        "adapter_name_or_path must be text (several paths have commas", "did you mean template?", "did you mean deepseek3?",
        "kt_num_threads must be a positive", "/none does not exist.", "the model has 6 experts",
    ]  # fmt: skip
    assert len(look.texts) == len(wanted), look.texts
    assert all(part in text for part, text in zip(wanted, look.texts, strict=True)), look.texts
    assert "do_train: unknown key, which is for training" in look.texts[1]
    look(model_name_or_path=str(tmp_path / "none"), adapter_name_or_path=str(model), temperature="hot")
    wanted = "temperature must be", "model_name_or_path: ", "adapter_config.json is missing"
    assert all(part in text for part, text in zip(wanted, look.texts, strict=True)), look.texts


@needs_native
def test_quantized_files(look, tmp_path, model):
    """They must be there, for this method and from this model."""
    keys = {"model_name_or_path": str(model), "kt_backend": "INT4", "kt_weight_path": str(tmp_path / "int4")}
    (tmp_path / "int4").mkdir()
    found = look(**keys)["kt_weight_path"]
    assert found.status is Status.ERROR and "int4 holds no integers of layer 1. " in found.text
    quantize_model(model, tmp_path / "int4", "int4")
    assert look(**keys)["kt_weight_path"].text == f"{tmp_path / 'int4'}: all layers, for INT4"
    found = look("kt_backend=INT8", **keys)["kt_weight_path"]
    assert found.status is Status.ERROR and "was made with method INT4, wanted INT8" in found.text


def test_a_model_without_a_tokenizer(look, tmp_path, model):
    bare = tmp_path / "bare"
    shutil.copytree(model, bare, ignore=shutil.ignore_patterns("tokenizer*"))
    found = look(model_name_or_path=str(bare))["tokenizer"]
    assert found.status is Status.ERROR and "Download tokenizer.json" in found.text


def test_links_are_those_of_the_installed_package(monkeypatch):
    from email.message import Message

    from llamafactory_kt.tools.doctor import finding

    described = Message()
    monkeypatch.setattr(finding.metadata, "metadata", lambda name: described)
    assert finding.see("engines.md") == ""
    described["Project-URL"] = "Documentation, https://example.org/docs/"
    assert finding.see("engines.md") == " See https://example.org/docs/engines.md."


def test_problems_come_first(look, demo, tmp_path):
    """What is in order is counted; -v lists it, last. Lines have no blanks at their ends."""
    config = write(tmp_path / "c.yaml", model_name_or_path=str(demo / "model"), template="none")
    texts = []
    for words in ([], ["-v"]):
        result = CliRunner().invoke(app, ["doctor", str(config), *words])
        assert result.exit_code == 1 and " \n" not in result.stdout
        texts.append([line.split()[0] for line in result.stdout.splitlines() if line[:1] in "oew"])
    short, long = texts
    assert short[0] == long[0] == "error" and "ok" not in short and long[-1] == "ok"
    assert sorted(long, key=["error", "warning", "ok"].index) == long
    config = write(tmp_path / "c.yaml", model_name_or_path=str(demo / "model"), kt_bakend="x", temperature="hot")
    result = CliRunner().invoke(app, ["doctor", str(config)])
    assert "did you mean kt_backend?" in result.stdout and "temperature must be a number" in result.stdout
    assert result.stdout.count("→ Correct the file.") == 1, "said once"


@needs_native
def test_a_model_larger_than_memory(look, tmp_path, monkeypatch):
    model = make_model(tmp_path / "model", "qwen3_moe", save_original_format=True)
    monkeypatch.setattr("llamafactory_kt.model.memory.available_memory", lambda: 50_000)
    found = look(model_name_or_path=str(model), kt_backend="native")["CPU memory"]
    assert found.status is Status.OK and found.text.endswith("weights stay in the mapped files")
    found = look(model_name_or_path=str(model), kt_backend="native", kt_load="copy")["CPU memory"]
    assert found.status is Status.ERROR and "kt_load: mmap" in found.text


@pytest.mark.parametrize(
    ("name", "value", "status"),
    [
        ("USE_V1", "1", "error"), ("LLAMAFACTORY_KT_DISABLE", "1", "error"), ("OMP_PROC_BIND", "true", "warning"),
        ("OMP_PROC_BIND", "false", None), ("OMP_NUM_THREADS", "100000", "warning"), ("OMP_NUM_THREADS", "1", "ok"),
        ("GOMP_SPINCOUNT", "infinite", "warning"), ("OMP_WAIT_POLICY", "PASSIVE", "ok"), ("KMP_BLOCKTIME", "0", "warning"),
    ],
)  # fmt: skip
def test_environment_variables(monkeypatch, name, value, status):
    for other in [n for n in os.environ if n.startswith(("OMP_", "GOMP_", "KMP_")) or n in DISTURBING]:
        monkeypatch.delenv(other)
    monkeypatch.setenv(name, value)
    assert {f.subject: f.status.value for f in variables()}.get(name) == status
