"""What a terminal chat with ``use_kt`` says while it loads: its own lines with the load table, warnings and errors.

LLaMA-Factory and transformers log configurations as a whole, some of them six times.
"""

from __future__ import annotations

import logging
import os
import sys

_OURS = "llamafactory_kt"
_DETAILS = (
    "llamafactory_kt.apply.",
    "llamafactory_kt.exchange.",
    "llamafactory_kt.peft_side.",
    "llamafactory_kt.model.on_gpu.",
)
"""how an adapter was divided, which the load table sums up; which experts a GPU has, said in the middle of an answer"""


def keep_log_short() -> None:
    """From now on, keep details out of the log, unless ``LLAMAFACTORY_VERBOSITY`` asks for them (``INFO``, ``DEBUG``).

    With ``WARN``, a terminal shows the load table all the same. A pipe has no more than it asks for.
    """
    level = os.environ.get("LLAMAFACTORY_VERBOSITY", "").upper()
    if level in ("INFO", "DEBUG"):
        return
    if level in ("WARN", "WARNING") and sys.stdout.isatty():
        logging.getLogger("llamafactory").setLevel(logging.INFO)
    for library in ("llamafactory", "transformers"):
        for handler in logging.getLogger(library).handlers:  # of which our own logger gets copies
            handler.addFilter(_matters)


def _matters(record: logging.LogRecord) -> bool:
    name = f"{record.name}."
    ours = name.startswith(f"{_OURS}.") and not name.startswith(_DETAILS)
    return ours or record.levelno >= logging.WARNING
