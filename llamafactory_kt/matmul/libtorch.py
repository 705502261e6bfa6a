"""libtorch_cpu, for what it offers C and not Python."""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path

import torch


@cache
def libtorch() -> ctypes.CDLL:
    """The loaded library; it also resolves the symbols of the libraries it is linked with, such as OpenMP's.

    Raises:
        OSError: This PyTorch was built in another way.
    """
    return ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
