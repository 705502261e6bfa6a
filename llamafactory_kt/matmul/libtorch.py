"""Torch's library of products, for what it offers C and not Python."""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path

import torch


@cache
def libtorch() -> ctypes.CDLL:
    """Also finds what that library is linked with, as OpenMP's.

    Raises:
        OSError: This torch is built in another way.
    """
    return ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
