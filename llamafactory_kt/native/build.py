"""Compiles the native kernels: ``hatch_build.py`` when the package is installed, and the tests with sanitizers.

Runs before anything is installed, so it needs the standard library alone. The sources include C headers only: a compiler without a C++
library builds them, zig's in seconds.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).parent
SOURCES, LIBRARY, NOT_BUILT = HERE / "src", HERE / "libkt_native.so", HERE / "not_built.txt"
"""the last: why there is no library"""
FROM_PYPI = "ziglang>=0.15"
"""a compiler for machines that have none"""
_AVX512 = ["-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl", "-mfma", "-mf16c"]
_AVX512_BF16 = [*_AVX512, "-mavx512bf16", "-mavx512vbmi", "-mavx512vnni"]
_FLAGS = {
    "avx2.cpp": ["-mavx2", "-mfma", "-mf16c"],
    "avx512.cpp": _AVX512,
    "avx512bf16.cpp": _AVX512_BF16,
    "amx.cpp": [*_AVX512_BF16, "-mamx-tile", "-mamx-bf16"],
}
"""each file's instruction set; the others run on any CPU"""
_COMMON = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-fno-exceptions", "-fno-rtti", "-fno-threadsafe-statics", "-ffp-contract=off"]  # fmt: skip
_PROBE = "#include <immintrin.h>\n#include <math.h>\n#include <string.h>\nvoid newest() { _tile_release(); }\n"
"""what the sources need of headers, compiler and assembler"""


def fingerprint() -> str:
    """Of all that a library is made from, and that the library bears: one that was made from anything else is never called."""
    digest = hashlib.sha256()
    for file in sorted([Path(__file__), *SOURCES.iterdir()]):
        digest.update(file.name.encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()[:32]


def unsupported() -> str | None:
    """Why there can be no kernels for this machine."""
    if sys.platform == "linux" and platform.machine() == "x86_64" and platform.libc_ver()[0] == "glibc":
        return None
    return f"they are written for Linux with glibc on x86-64, not for {platform.system()} on {platform.machine()}"


def compilers() -> list[list[str]]:
    """The commands to try: ``CXX`` alone if it is set; the system's, then zig from PyPI."""
    if named := os.environ.get("CXX"):
        return [shlex.split(named)]
    found = [[name] for name in ("c++", "g++", "clang++") if shutil.which(name)]
    if importlib.util.find_spec("ziglang"):
        # "c++" would also compile a C++ library, for a minute
        found.append([sys.executable, "-m", "ziglang", "cc", "-target", "x86_64-linux-gnu.2.28"])
    return found


def requirements() -> list[str]:
    """What to install before a build: zig, unless there is a compiler that knows the instruction sets, or ``CXX`` names one."""
    flags = sorted({flag for flags in _FLAGS.values() for flag in flags})
    probe = ["-std=c++17", *flags, "-x", "c++", "-c", "-", "-o", os.devnull]
    able = (
        unsupported() or "CXX" in os.environ or any(not _run([*compiler, *probe], _PROBE) for compiler in compilers())
    )
    return [] if able else [FROM_PYPI]


def build() -> str | None:
    """Make the library, unless the one that is there was made from these sources.

    Returns:
        Why it could not be made, or None.
    """
    wanted = fingerprint()
    if LIBRARY.is_file() and wanted.encode() in LIBRARY.read_bytes():
        return None
    if problem := unsupported():
        return problem
    problems = []
    for compiler in compilers():
        problem = compile_files(compiler, SOURCES.glob("*.cpp"), LIBRARY, link=["-shared", "-s"])
        if not problem:
            return None
        problems.append(f"{' '.join(compiler)} failed: {problem}")
    return "\n".join(problems) or "there is no C++ compiler"


def compile_files(compiler: Sequence[str], files: Iterable[Path], target: Path, flags: Sequence[str] = (), link: Sequence[str] = ()) -> str:  # fmt: skip
    """Compile and link, all files at once; ``target`` appears when it is complete, and is never written in place: a process may use it.

    Args:
        compiler: The command.
        files: Those of the kernels get the flags of their instruction set.
        target: The library or program.
        flags: For compiling and linking, after the usual ones.
        link: For linking, after the files.

    Returns:
        The end of what the compiler said, if it failed.
    """
    common = [*compiler, *_COMMON, f'-DKT_SOURCES="{fingerprint()}"', *flags]
    with tempfile.TemporaryDirectory() as directory, ThreadPoolExecutor() as threads:
        commands = {
            Path(directory, f"{file.stem}.o"): [*common, *_FLAGS.get(file.name, []), "-c", str(file), "-o"]
            for file in files
        }
        problems = threads.map(lambda item: _run([*item[1], str(item[0])], cache=directory), commands.items())
        if problem := next(filter(None, problems), ""):
            return problem
        linked = Path(directory, "linked")
        if problem := _run([*compiler, *flags, "-o", str(linked), *map(str, commands), *link, "-Wl,--as-needed", "-lm"], cache=directory):  # fmt: skip
            return problem
        partial = target.with_name(f"{target.name}.{os.getpid()}.part")
        try:
            shutil.copy(linked, partial)
            partial.replace(target)
        except OSError as error:
            partial.unlink(missing_ok=True)
            return str(error)
    return ""


def platform_tag(library: Path = LIBRARY) -> str:
    """The systems on which the library loads, as a wheel's tag (PEP 600): those with the newest glibc whose symbols it names."""
    versions = re.findall(rb"GLIBC_2\.(\d+)", library.read_bytes())
    return f"manylinux_2_{max([5, *map(int, versions)])}_x86_64"  # 2.5: the oldest that PEP 600 has a name for


def _run(command: list[str], text: str | None = None, cache: str | None = None) -> str:
    """The end of what the command says, if it fails."""
    zig = {"ZIG_GLOBAL_CACHE_DIR": cache, "ZIG_LOCAL_CACHE_DIR": cache} if cache else {}
    try:
        done = subprocess.run(command, input=text, capture_output=True, text=True, env={**os.environ, **zig})
    except OSError as error:
        return str(error)
    return "" if done.returncode == 0 else (done.stderr.strip() or f"exit status {done.returncode}")[-1000:]


if __name__ == "__main__":
    sys.exit(build())
