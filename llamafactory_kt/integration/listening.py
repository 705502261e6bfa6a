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

LOCAL, API, GRADIO = "127.0.0.1", "API_HOST", "GRADIO_SERVER_NAME"
"""the address, and where LLaMA-Factory's servers look for another one"""


@contextlib.contextmanager
def listening_locally(variable: str) -> Iterator[None]:
    """Let a server of ``llamafactory-cli`` listen on 127.0.0.1, if the command line sets ``use_kt`` and the environment no address.

    Args:
        variable: :data:`API` or :data:`GRADIO`.
    """
    if not asks_for("use_kt") or os.environ.get(variable):
        yield
        return
    logger.warning(
        "This server listens on %s alone, because of use_kt. To let other machines in, set %s=0.0.0.0.", LOCAL, variable
    )
    os.environ[variable] = LOCAL
    try:
        yield
    finally:
        del os.environ[variable]


def warn_if_open() -> None:
    """Say so, if a page of LLaMA-Factory listens everywhere because nobody chose an address."""
    if not os.environ.get(GRADIO):
        logger.warning(
            "LLaMA-Factory's pages listen on all addresses of this machine, and whoever reaches them can load any path. Set %s=%s "
            "to keep others out.", GRADIO, LOCAL,
        )  # fmt: skip
