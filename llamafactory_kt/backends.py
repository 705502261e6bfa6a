"""The names of engines, as configurations spell them."""

from __future__ import annotations

from difflib import get_close_matches

from .errors import KTConfigError

BACKENDS = ("auto", "AMXBF16", "AMXINT8", "AMXINT4", "torch")
NOT_YET = ("AMXINT8", "AMXINT4")


def canonical_backend(name: object, not_yet: tuple[str, ...] = NOT_YET) -> str:
    """A backend in the spelling of :data:`BACKENDS`; any letter case, with or without ``_SFT``.

    Args:
        name: as the configuration has it.
        not_yet: backends to refuse; SGLang has all of them.

    Raises:
        KTConfigError: The name is unknown, or of an engine that is not there yet.

    >>> canonical_backend("amxbf16_sft")
    'AMXBF16'
    """
    known = {backend.upper(): backend for backend in BACKENDS}
    plain = str(name).upper().removesuffix("_SFT")
    if plain not in known:
        close = get_close_matches(plain, known, n=1)
        hint = f"; did you mean {known[close[0]]}?" if close else "."
        raise KTConfigError(f"kt_backend: unknown value {name!r}, expected one of {', '.join(BACKENDS)}{hint}")
    if known[plain] in not_yet:
        raise KTConfigError(f"kt_backend: {known[plain]} is not supported yet; use auto, AMXBF16 or torch.")
    return known[plain]
