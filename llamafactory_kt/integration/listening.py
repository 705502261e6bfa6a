"""Where LLaMA-Factory's servers listen with ``use_kt``: on this machine alone, unless the environment names another address.

LLaMA-Factory listens on all addresses, and whoever reaches its pages can load any path.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator

from .patching import asks_for

logger = logging.getLogger("llamafactory_kt")

LOCAL = "127.0.0.1"


@contextlib.contextmanager
def listening_locally(variable: str) -> Iterator[None]:
    """Let a server of ``llamafactory-cli`` listen on 127.0.0.1, if the command line sets ``use_kt`` and the environment no address.

    Args:
        variable: of the environment, from which LLaMA-Factory takes the address.
    """
    if not asks_for("use_kt") or os.environ.get(variable):
        yield
        return
    logger.warning("Listening on %s alone, for use_kt. To let other machines in, set %s=0.0.0.0.", LOCAL, variable)
    os.environ[variable] = LOCAL
    try:
        yield
    finally:
        del os.environ[variable]
