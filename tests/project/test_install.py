"""Both ways of installing, into environments of their own that see this environment's libraries; and uninstalling."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from helpers.places import ROOT

UV = Path(sysconfig.get_path("scripts")) / "uv"
KERNELS = "from llamafactory_kt.native.library import library; print(library())"
CHECK = (
    "import torch, llamafactory_kt, _llamafactory_kt_autoload\n"
    "from llamafactory.hparams import ModelArguments\n"
    "print(ModelArguments(model_name_or_path='m', use_kt=True, kt_backend='AMXBF16').kt_backend)\n"
    "print(llamafactory_kt.__file__); print(_llamafactory_kt_autoload.__file__)\n" + KERNELS + "\n"
    "from llamafactory_kt.ground.travelling import travelling; from llamafactory_kt.integration.webui.advice import advice\n"
    "print(*sorted(p.name for p in travelling('examples/demo').glob('*/*.safetensors')), bool(advice('kt_debug_dir needs kt_debug: true')))"
)

pytestmark = pytest.mark.skipif(not UV.exists(), reason="uv is not installed in this environment")


@pytest.fixture
def environment(tmp_path):
    """An empty virtual environment that finds this one's libraries after its own."""
    subprocess.run([UV, "venv", "--quiet", "--python", sys.executable, tmp_path / "env"], check=True)
    site = next((tmp_path / "env" / "lib").glob("python*")) / "site-packages"
    (site / "libraries.pth").write_text(sysconfig.get_path("purelib") + "\n")
    source = tmp_path / "source"
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(".git", "tests", "images", "__pycache__", ".*_cache"))
    return tmp_path / "env", site, source


def uv(*arguments, **keys):
    subprocess.run([UV, "pip", *arguments], check=True, capture_output=True, text=True, **keys)


def run(env: Path, code: str) -> subprocess.CompletedProcess:
    clean = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    return subprocess.run([env / "bin" / "python", "-c", code], capture_output=True, text=True, cwd="/", env=clean)


def files(site: Path) -> set[str]:
    return {str(p.relative_to(site)) for p in site.rglob("*") if "__pycache__" not in p.parts}


@pytest.mark.parametrize("editable", [False, True], ids=["plain", "editable"])
def test_install_and_uninstall(environment, editable):
    env, site, source = environment
    before = files(site)
    flags = ["--editable"] if editable else []
    uv("install", "--python", env / "bin/python", "--no-deps", *flags, source)
    assert (env / "bin" / "llamafactory-kt").exists()
    assert (site / "_llamafactory_kt_autoload" / "__init__.py").is_file(), "physically present in both modes"
    result = run(env, CHECK)
    assert result.returncode == 0, result.stderr
    backend, package, autoload, kernels, demo = result.stdout.splitlines()
    assert backend == "AMXBF16" and autoload.startswith(str(site))
    assert package.startswith(str(source) if editable else str(site))
    assert not kernels.startswith("the native kernels were not built"), kernels
    assert demo == "adapter_model.safetensors model.safetensors True"
    assert (site / "llamafactory_kt" / "travelling").is_dir() is not editable
    if editable:  # the source tree moves away: one warning, and torch still imports
        source.rename(source.with_name("moved"))
        result = run(env, "import torch; print(torch.ones(1).item())")
        assert result.stdout.strip() == "1.0" and result.stderr.count("could not be activated") == 1, result.stderr
    uv("uninstall", "--python", env / "bin/python", "llamafactory-kt-experts")
    assert files(site) == before and not (env / "bin" / "llamafactory-kt").exists()
    assert run(env, "import torch").returncode == 0


def test_without_a_compiler_it_is_installed_without_the_kernels(environment, monkeypatch):
    env, _, source = environment
    (source / "llamafactory_kt/native/libkt_native.so").unlink(missing_ok=True)
    monkeypatch.setenv("CXX", "false")
    uv("install", "--python", env / "bin/python", "--no-deps", source)
    result = run(env, KERNELS)
    assert (
        result.stdout.strip()
        == "the native kernels were not built with the package: false failed: exit status 1; install g++ or clang++, then the package again"
    ), result.stderr
