"""The library of native kernels as the package's build makes it: from which sources, for which systems, and what happens without it."""

from __future__ import annotations

import _ctypes
import ctypes
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.places import ROOT

from llamafactory_kt.native import build, library

pytestmark = pytest.mark.skipif(build.unsupported() is not None, reason=str(build.unsupported()))
SMALL = '#include "kt_native.h"\nextern "C" __attribute__((visibility("default"))) const char *kt_sources() { return KT_SOURCES; }\n'
needs_compiler = pytest.mark.skipif(not build.compilers(), reason="there is no C++ compiler")


@pytest.fixture
def small(tmp_path, monkeypatch):
    """Sources of one function, and where its library goes."""
    monkeypatch.setattr(build, "SOURCES", tmp_path / "src")
    monkeypatch.setattr(build, "LIBRARY", tmp_path / "libkt_native.so")
    build.SOURCES.mkdir()
    (build.SOURCES / "kt_native.h").write_text("// 1\n")
    (build.SOURCES / "api.cpp").write_text(SMALL)
    return build.LIBRARY


def loaded(**replaced) -> ctypes.CDLL | str:
    """The library as a new process gets it."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in replaced.items():
            patch.setattr(library, name, value)
        return library.library.__wrapped__()


def test_the_kernels_are_here():
    """A machine that can run them has them: other tests skip where they are missing."""
    if re.search(r"^flags.* avx2 ", Path("/proc/cpuinfo").read_text(), re.MULTILINE):
        assert isinstance(library.library(), ctypes.CDLL), library.library()


@pytest.mark.skipif(not build.LIBRARY.is_file(), reason="the kernels have not been built")
def test_one_library_for_all_systems_of_pytorch():
    """PyTorch's wheels ask for glibc 2.28."""
    found = re.fullmatch(r"manylinux_2_(\d+)_x86_64", build.platform_tag())
    assert found and int(found[1]) <= 28
    needed = subprocess.run(["ldd", build.LIBRARY], capture_output=True, text=True).stdout
    assert not re.search(r"stdc\+\+|gomp|torch", needed), needed


@pytest.mark.parametrize("text, tag", [(b"", 5), (b"GLIBC_2.2.5\0GLIBC_2.14\0GLIBC_2.9", 14)])
def test_the_tag_is_that_of_the_newest_symbol(tmp_path, text, tag):
    (tmp_path / "library").write_bytes(text)
    assert build.platform_tag(tmp_path / "library") == f"manylinux_2_{tag}_x86_64"


@needs_compiler
def test_a_library_is_built_when_a_source_changes(small):
    assert build.build() is None
    first, inode = build.fingerprint(), small.stat().st_ino
    assert build.build() is None and small.stat().st_ino == inode, "nothing has changed"
    held = small.open("rb")
    before = held.read()
    (build.SOURCES / "kt_native.h").write_text("// 2\n")
    assert build.build() is None and build.fingerprint() != first
    assert build.fingerprint().encode() in small.read_bytes()
    held.seek(0)
    assert held.read() == before, "a process may have it mapped"
    assert [path.name for path in small.parent.iterdir() if path.is_file()] == [small.name]


@needs_compiler
def test_a_library_of_other_sources_is_not_called(small):
    assert build.build() is None
    (build.SOURCES / "kt_native.h").write_text("// 2\n")
    assert "built from other sources" in loaded(LIBRARY=small)
    assert "built from other sources" in loaded(LIBRARY=Path(_ctypes.__file__)), "one without a fingerprint"
    garbage = small.with_name("garbage.so")
    garbage.write_text("no library")
    assert "do not load" in loaded(LIBRARY=garbage)


def test_the_reason_why_there_is_none(small, monkeypatch):
    monkeypatch.setenv("CXX", "false")
    assert build.build() == "false failed: exit status 1"
    assert build.requirements() == [], "whoever names a compiler wants no other"
    monkeypatch.setenv("CXX", "/no/such/compiler -x")
    assert "No such file or directory" in build.build()
    note = small.with_name("not_built.txt")
    assert loaded(LIBRARY=small, NOT_BUILT=note).endswith("install the package again")
    note.write_text("there is no C++ compiler")
    assert (
        loaded(LIBRARY=small, NOT_BUILT=note)
        == "the native kernels were not built with the package: there is no C++ compiler; install g++ or clang++, then the package again"
    )


def test_without_a_compiler_one_is_installed(small, monkeypatch):
    monkeypatch.setattr(build, "compilers", list)
    assert build.requirements() == [build.FROM_PYPI]
    assert build.build() == "there is no C++ compiler"
    monkeypatch.setattr(build.platform, "machine", lambda: "aarch64")
    assert build.requirements() == []
    assert build.build() == "they are written for Linux with glibc on x86-64, not for Linux on aarch64"


@needs_compiler
@pytest.mark.parametrize("unknown", ["avx512bf16", "amx-tile"])
def test_a_compiler_that_does_not_know_the_instructions_is_not_enough(monkeypatch, tmp_path, unknown):
    old = tmp_path / "c++"
    old.write_text(f'#!/bin/sh\ncase "$*" in *{unknown}*) echo unrecognized >&2; exit 1;; esac\nexit 0\n')
    old.chmod(0o755)
    monkeypatch.setattr(build, "compilers", lambda: [[str(old)]])
    assert build.requirements() == [build.FROM_PYPI]


@pytest.mark.nightly
def test_zig_builds_them(tmp_path, monkeypatch):
    """The machine without a compiler; the library is checked as the other one."""
    monkeypatch.setattr(build.shutil, "which", lambda name: None)
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(build, "LIBRARY", tmp_path / "libkt_native.so")
    assert build.build() is None and build.platform_tag(build.LIBRARY) <= "manylinux_2_28_x86_64"
    program = tmp_path / "check_kernels"
    link = [str(build.LIBRARY), f"-Wl,-rpath,{tmp_path}"]
    checks = Path(__file__).with_name("check_kernels.cpp")
    assert not build.compile_files(build.compilers()[0], [checks], program, [f"-I{build.SOURCES}", "-pthread"], link)
    done = subprocess.run([program], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:]


@pytest.mark.parametrize("compiler", ["false", None], ids=["without", "with"])
def test_wheels(tmp_path, compiler, monkeypatch):
    """A wheel with the kernels is for x86-64; without them, for all systems, and says why."""
    if compiler is None and not build.LIBRARY.is_file():
        pytest.skip("the kernels have not been built")
    source = tmp_path / "source"
    ignored = shutil.ignore_patterns(
        ".git", "tests", "images", "__pycache__", ".*_cache", *(["*.so"] if compiler else [])
    )
    shutil.copytree(ROOT, source, ignore=ignored)
    if compiler:
        monkeypatch.setenv("CXX", compiler)
    code = "from hatchling.build import build_wheel, build_sdist; build_wheel('..'); build_sdist('..')"
    done = subprocess.run([sys.executable, "-c", code], cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    names = subprocess.run([sys.executable, "-m", "zipfile", "-l", wheel], capture_output=True, text=True).stdout
    assert wheel.name.endswith("-py3-none-any.whl" if compiler else f"-py3-none-{build.platform_tag()}.whl")
    assert ("libkt_native.so" in names) == (compiler is None)
    assert ("native/not_built.txt" in names) == (compiler is not None)
    assert (done.stdout + done.stderr).count("Without the native kernels") == (compiler is not None)
    (sdist,) = tmp_path.glob("*.tar.gz")
    names = subprocess.run(["tar", "-tf", sdist], capture_output=True, text=True).stdout
    assert "native/src/api.cpp" in names and "hatch_build.py" in names and "libkt_native" not in names
