"""kt-kernel's engines. The only code that knows kt-kernel."""

from .inference_engine import AVX2BF16
from .sft_engine import AMXBF16, AMXINT4, AMXINT8

ENGINES = (AMXBF16, AMXINT8, AMXINT4, AVX2BF16)
PACKING = {engine.method.short.lower(): engine for engine in (AMXINT8, AMXINT4)}
"""``int8``, ``int4``: the engines whose weights ``llamafactory-kt quantize`` packs"""
