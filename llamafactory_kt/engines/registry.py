"""The names of engines, as configurations spell them."""

from __future__ import annotations

from difflib import get_close_matches

from ..ground.errors import KTConfigError

BACKENDS = ("auto", "AMXBF16", "AMXINT8", "AMXINT4", "AVX2BF16", "oneDNN", "torch")
PACKED = ("AMXINT8", "AMXINT4")
"""backends that can read packed weights (``kt_weight_path``)"""


def canonical_backend(name: object) -> str:
    """A backend in the spelling of :data:`BACKENDS`; any letter case, with or without ``_SFT``.

    Raises:
        KTConfigError: The name is unknown.

    >>> canonical_backend("amxbf16_sft")
    'AMXBF16'
    """
    known = {backend.upper(): backend for backend in BACKENDS}
    plain = str(name).upper().removesuffix("_SFT")
    if plain not in known:
        close = get_close_matches(plain, known, n=1)
        hint = f"; did you mean {known[close[0]]}?" if close else "."
        raise KTConfigError(f"kt_backend: unknown value {name!r}, expected one of {', '.join(BACKENDS)}{hint}")
    return known[plain]
