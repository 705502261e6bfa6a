"""``check_kernels.cpp``: the kernels against loops of doubles, with every array exactly as long as may be read; plain, and with sanitizers. AMX is
emulated: few machines have it. AVX-512 is emulated where ``SIMDE`` names a directory with SIMDe."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from helpers.native import EMULATED_TILES

from llamafactory_kt.native.build import LIBRARY, SOURCES, compile_files, compilers
from llamafactory_kt.native.library import library

FOUND = library()
SETS = [] if isinstance(FOUND, str) else FOUND.kt_instruction_sets().decode().split(",")
pytestmark = [
    pytest.mark.skipif(not SETS, reason=str(FOUND)),
    pytest.mark.skipif(not compilers(), reason="there is no C++ compiler"),
]
CHECKS = Path(__file__).with_name("check_kernels.cpp")
INCLUDE = [f"-I{SOURCES}", "-pthread"]
KERNELS = "avx2", "avx512", "avx512bf16", "amx"
NO_KERNELS = '#include "isa.h"\nnamespace kt {{ extern const Kernels {0}{{"none"}}; }}'
PROBES = {
    "address": """
        #include <stdlib.h>
        int main(int count, char **) {
            volatile char *bytes = (char *)malloc(size_t(count));
            return bytes[count] * 0;
        }
    """,
    "undefined": """
        int main(int count, char **) {
            volatile int sum = 2147483647;
            sum = sum + count;
        }
    """,
    "thread": """
        #include <pthread.h>
        int shared;
        void *add(void *) { shared++; return 0; }
        int main() {
            pthread_t other;
            pthread_create(&other, 0, add, 0);
            shared++;
            pthread_join(other, 0);
        }
    """,
}
"""a program with what the sanitizer is for; without it, it returns 0"""


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """Linked with the library that is installed."""
    return linked_with(LIBRARY, tmp_path_factory.mktemp("plain"))


def linked_with(library: Path, directory: Path) -> Path:
    program = directory / "check_kernels"
    problem = compile_files(compilers()[0], [CHECKS], program, INCLUDE, [str(library), f"-Wl,-rpath,{library.parent}"])
    assert not problem, problem
    return program


@pytest.mark.parametrize("instructions", SETS)
def test_kernels(plain, instructions):
    check(plain, instructions)


def test_emulated_tiles(emulated, tmp_path):
    check(linked_with(emulated, tmp_path), "amx")


@pytest.mark.nightly
@pytest.mark.skipif("SIMDE" not in os.environ, reason="needs SIMDE=DIR, a clone of github.com/simd-everywhere/simde")
@pytest.mark.parametrize("instructions", ["avx512", "avx512bf16", "amx"])
def test_emulated_vectors(instructions, tmp_path):
    """Of a CPU without them. Each file is compiled under another name, which has no flags of an instruction set."""
    files = [source for source in SOURCES.glob("*.cpp") if source.stem not in KERNELS]
    for name in KERNELS:
        emulated = f'#include "{SOURCES / name}.cpp"' if name == instructions else NO_KERNELS.format(name)
        files.append(tmp_path / f"emulated_{name}.cpp")
        files[-1].write_text(emulated)
    vectors = [f"-I{CHECKS.with_name('simde')}", f"-I{os.environ['SIMDE']}", "-DKT_EMULATED_VECTORS", EMULATED_TILES]
    program = tmp_path / "check_kernels"
    problem = compile_files(compilers()[0], [*files, CHECKS], program, [*INCLUDE, *vectors, "-O1", "-w"])
    assert not problem, problem
    check(program, instructions)


def test_an_instruction_set_that_the_cpu_does_not_have(plain):
    done = subprocess.run([plain, "avx1024"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "This CPU does not have avx1024\n")


@pytest.mark.parametrize(
    "wanted", [("address", "undefined"), pytest.param(("thread",), marks=pytest.mark.nightly)], ids="+".join
)
def test_sanitizers(wanted, tmp_path):
    compiler = compilers()[0]
    sanitizers = [name for name in wanted if finds(compiler, name, tmp_path)]
    if not sanitizers:
        pytest.skip(f"{' '.join(compiler)} has no sanitizer for {' or '.join(wanted)}")
    program = tmp_path / "check_kernels"
    problem = compile_files(
        compiler, [*SOURCES.glob("*.cpp"), CHECKS], program, [*INCLUDE, EMULATED_TILES, *flags(*sanitizers)]
    )
    assert not problem, problem
    check(program)
    if missing := set(wanted) - set(sanitizers):
        pytest.skip(f"passed, but {' '.join(compiler)} has no sanitizer for {' or '.join(missing)}")


def check(program: Path, *arguments: str) -> None:
    done = subprocess.run([program, *arguments], capture_output=True, text=True)
    assert done.returncode == 0 and "cases, 0 failures" in done.stdout, (
        f"{done.returncode}: {(done.stdout + done.stderr)[-3000:]}"
    )


def flags(*sanitizers: str) -> list[str]:
    return ["-Og", "-g1", f"-fsanitize={','.join(sanitizers)}", "-fno-sanitize-recover=all"]


def finds(compiler: list[str], sanitizer: str, directory: Path) -> bool:
    """Whether a program that does what the sanitizer is for ends with an error."""
    source, program = directory / f"{sanitizer}.cpp", directory / sanitizer
    source.write_text(PROBES[sanitizer])
    problem = compile_files(compiler, [source], program, ["-pthread", *flags(sanitizer)])
    return not problem and subprocess.run([program], capture_output=True).returncode != 0
