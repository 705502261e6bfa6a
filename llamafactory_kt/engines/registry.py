"""All engines: those of this package, and those that other distributions register.

A distribution registers engines as entry points of the group ``llamafactory_kt.engines``::

    [project.entry-points."llamafactory_kt.engines"]
    example = "example_package.engine:ExampleEngine"
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from difflib import get_close_matches
from functools import cache
from importlib.metadata import entry_points

from ..ground.errors import KTConfigError, first_line
from . import ktkernel, native, onednn, reference
from .base import Engine

logger = logging.getLogger(__name__)

AUTO = "auto"
ENTRY_POINTS = "llamafactory_kt.engines"

_BUILT_IN: tuple[type[Engine], ...] = (
    *ktkernel.ENGINES,
    *native.ENGINES,
    onednn.OneDNNEngine,
    reference.ReferenceEngine,
)


@cache
def engines() -> tuple[type[Engine], ...]:
    """Every engine, in the order in which ``auto`` prefers them where nothing is measured.

    One of another distribution that is broken, or takes the name of another, is left out with a warning: it must not stop those
    who do not use it.
    """
    found = list(_BUILT_IN)
    for point in entry_points(group=ENTRY_POINTS):
        try:
            engine = point.load()
            problem = _registration_problem(engine, found)
        except Exception as error:  # of code that is not ours
            problem = f"{type(error).__name__}: {first_line(error)}"
        if problem is None:
            found.append(engine)
        else:
            source = point.dist.name if point.dist else "an unknown distribution"
            logger.warning("The engine %r of %s is left out: %s", point.name, source, problem)
    return tuple(found)


def _registration_problem(engine: object, known: Iterable[type[Engine]]) -> str | None:
    if not (isinstance(engine, type) and issubclass(engine, Engine)):
        return f"{engine!r} is not a subclass of Engine"
    if missing := sorted(getattr(engine, "__abstractmethods__", ())):
        return f"it does not define {', '.join(missing)}"
    if not isinstance(getattr(engine, "name", None), str):
        return "it has no name"
    taken = {name.upper() for other in known for name in (other.name, *other.aliases)} | {AUTO.upper()}
    if twice := [name for name in (engine.name, *engine.aliases) if name.upper() in taken]:
        return f"there is already an engine called {', '.join(twice)}"
    return None


def backend_names() -> tuple[str, ...]:
    """All values of ``kt_backend``."""
    return (AUTO, *(engine.name for engine in engines()))


def canonical_name(name: object) -> str:
    """A backend as :func:`backend_names` spells it; any letter case, and the engines' aliases.

    Raises:
        KTConfigError: The name is unknown.

    >>> canonical_name("amxbf16_sft")
    'AMXBF16'
    """
    known = {alias.upper(): engine.name for engine in engines() for alias in (engine.name, *engine.aliases)}
    known[AUTO.upper()] = AUTO
    plain = str(name).upper()
    if plain not in known:
        close = get_close_matches(plain, known, n=1)
        hint = f"; did you mean {known[close[0]]}?" if close else "."
        raise KTConfigError(f"kt_backend: unknown value {name!r}, expected one of {', '.join(backend_names())}{hint}")
    return known[plain]


def find_engine(name: object) -> type[Engine] | None:
    """The engine of that name; None for ``auto``.

    Raises:
        KTConfigError: The name is unknown.
    """
    wanted = canonical_name(name)
    return next((engine for engine in engines() if engine.name == wanted), None)


def get_engine(name: object) -> type[Engine]:
    """The engine of that name, which is not ``auto``."""
    engine = find_engine(name)
    assert engine is not None, "auto is no engine"
    return engine
