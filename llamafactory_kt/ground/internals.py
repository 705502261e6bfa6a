"""Code that relies on what another library does not promise: private functions, objects in memory, C interfaces.

Each such file declares an :class:`Internal` with the versions that it was made for, and does nothing with others. Users can switch it
off: ``LLAMAFACTORY_KT_WITHOUT=name,name``, or ``all``.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cache
from importlib import metadata

from packaging.specifiers import SpecifierSet

SWITCH = "LLAMAFACTORY_KT_WITHOUT"
NAMES = frozenset(
    {
        "auto-classes", "experts-contract", "kt-kernel", "kt-kernel-memory", "mkldnn-blob", "mkldnn-ops", "openmp", "peft-layers",
        "peft-lora", "quantized-checkpoints", "torch-archive", "transformers-names",
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

    @property
    def usable(self) -> bool:
        """Whether the library is one of those versions, and nobody has switched this off."""
        return not {self.name, "all"} & _switched_off() and _installed(self.library, self.versions)


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
