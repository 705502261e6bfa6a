"""kt-kernel's engines. The only code that knows kt-kernel."""

from __future__ import annotations

from .inference_engine import AVX2BF16
from .methods import Method
from .sft_engine import AMXBF16, AMXINT4, AMXINT8

ENGINES = (AMXBF16, AMXINT8, AMXINT4, AVX2BF16)
PACKING = {engine.method.short.lower(): engine for engine in (AMXINT8, AMXINT4)}
"""``int8``, ``int4``: the engines whose weights ``llamafactory-kt quantize`` packs"""


def packing_of(name: str | None) -> Method | None:
    """How the engine of that name packs weights; None if it is none of kt-kernel's."""
    return next((engine.method for engine in ENGINES if engine.name == name), None)
