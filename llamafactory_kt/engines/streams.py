"""The GPUs whose streams call engines."""

from __future__ import annotations

import torch

_devices: set[torch.device] = set()


def note_device(device: torch.device) -> None:
    """A stream of this GPU calls an engine from now on."""
    _devices.add(device)


def wait_for_streams() -> None:
    """Wait for every call that was ever queued, before what it reads is changed or freed."""
    for device in list(_devices):
        torch.cuda.synchronize(device)
