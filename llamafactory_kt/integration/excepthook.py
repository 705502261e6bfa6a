"""How ``llamafactory-cli chat|api|webchat`` reports one of our errors."""

from __future__ import annotations

import functools
import sys
from types import TracebackType

from ..ground.errors import KTError, traceback_wanted
from ..ground.tensors.safetensors_files import is_interrupt

_MARK = "__llamafactory_kt__"


def end_in_one_paragraph(debug: bool = False) -> None:
    """From now on, print an uncaught KTError as one paragraph on stderr, and Ctrl-C as one line; other errors, and all with debugging, as before.

    The exit status is Python's in any case.
    """
    stock = sys.excepthook
    if debug or traceback_wanted() or hasattr(stock, _MARK):
        return

    @functools.wraps(stock)
    def show(kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
        if isinstance(error, KTError):
            print(f"Error: {error}", file=sys.stderr)
        elif is_interrupt(error):
            # in a terminal after its "^C", and after a progress bar
            print("\nInterrupted." if sys.stderr.isatty() else "Interrupted.", file=sys.stderr)
        else:
            stock(kind, error, traceback)

    setattr(show, _MARK, True)
    sys.excepthook = show
