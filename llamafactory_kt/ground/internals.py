"""Code that relies on what another library does not promise: private functions, objects in memory, C interfaces.

Each such file declares an :class:`Internal` with the versions that it was made for, and does nothing with others. Where ``use_kt``
cannot do without, it goes on with others too: they are :func:`untested`, and a load checks what it computes
(:mod:`..model.untested`). Users can switch each off: ``LLAMAFACTORY_KT_WITHOUT=name,name``, or ``all``.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from typing import Any

from packaging.specifiers import SpecifierSet

TESTED = {"transformers": ">=5.6,<5.25", "peft": ">=0.18.1,<0.22", "torch": ">=2.9,<2.16"}
"""library -> versions that ``make test MATRIX=...`` has shown right; docs/versions.md has the results"""
CACHE_ARGUMENTS = "past_key_values", "cache"
"""what transformers' models and ``generate`` call the cache of keys and values; the second from 5.24 on"""
SWITCH = "LLAMAFACTORY_KT_WITHOUT"
NAMES = frozenset(
    {
        "auto-classes", "experts-contract", "kt-kernel", "kt-kernel-memory", "openmp", "peft-layers",
        "growing-cache", "latent-attention", "prompt-cache", "cuda-runtime", "peft-lora", "quantized-checkpoints", "tracing", "torch-archive", "transformers-names",
    }
)  # fmt: skip
"""of every :class:`Internal`"""


@dataclass(frozen=True)
class Internal:
    """One such use.

    >>> Internal("example", "packaging", ">=1").usable, Internal("example", "packaging", "<1").usable
    (True, False)
    """

    name: str
    """as :data:`SWITCH` spells it"""
    library: str
    """distribution"""
    versions: str
    """of the library, that this was made for; as in a requirement"""
    essential: bool = False
    """whether ``use_kt`` cannot do without, so that other versions are tried too"""

    @property
    def usable(self) -> bool:
        """Whether the library is one of those versions (any, if essential), and nobody has switched this off."""
        if {self.name, "all"} & _switched_off():
            return False
        return self.tested or (self.essential and _installed(self.library, ""))

    @property
    def tested(self) -> bool:
        """Whether the library is one of those versions."""
        return _installed(self.library, self.versions)


def untested() -> list[str]:
    """The installed libraries whose version is not in :data:`TESTED`, each with its version and those tested."""
    return [
        f"{library} {metadata.version(library)} (tested: {versions})"
        for library, versions in TESTED.items()
        if _installed(library, "") and not _installed(library, versions)
    ]


def cache_of(kwargs: Mapping[str, Any]) -> Any:
    """The cache that a model of transformers, or ``generate``, is called with; None without one."""
    return next((kwargs[name] for name in CACHE_ARGUMENTS if kwargs.get(name) is not None), None)


def _switched_off() -> set[str]:
    return {name.strip() for name in os.environ.get(SWITCH, "").split(",")} - {""}


def switch_problem() -> str | None:
    """What is wrong with the environment variable, or None."""
    unknown = sorted(_switched_off() - NAMES - {"all"})
    if not unknown:
        return None
    return (
        f"{SWITCH}: unknown name {', '.join(map(repr, unknown))}, expected some of {', '.join(sorted(NAMES))}, or all."
    )


@cache  # asked for every token; reading a distribution's metadata takes 0.7 ms
def _installed(library: str, versions: str) -> bool:
    try:
        return SpecifierSet(versions).contains(metadata.version(library), prereleases=True)
    except metadata.PackageNotFoundError:
        return False
