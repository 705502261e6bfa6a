"""Where calls of the kernels are noted while somebody records what a module computes (:mod:`..tracing`); PyTorch does not see them."""

from __future__ import annotations

import threading
from typing import Any, Protocol

import torch


class Recorder(Protocol):
    """What notes calls."""

    def note(self, kind: str, call: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor | None) -> None:
        """One call, which has been made.

        Args:
            call: what else is needed to make it again.
        """

    def pause(self) -> Any:
        """A context in which PyTorch's operators are not recorded: those that are a part of the call."""


class _Active(threading.local):
    recorder: Recorder | None = None


active = _Active()
