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
        switched_off = os.environ.get(SWITCH)
        if switched_off and {self.name, "all"} & {name.strip() for name in switched_off.split(",")}:
            return False
        return _installed(self.library, self.versions)


@cache  # asked for every token; reading a distribution's metadata takes 0.7 ms
def _installed(library: str, versions: str) -> bool:
    try:
        return SpecifierSet(versions).contains(metadata.version(library), prereleases=True)
    except metadata.PackageNotFoundError:
        return False
