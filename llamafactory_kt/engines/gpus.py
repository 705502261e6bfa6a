"""The GPUs that experts may be on, as PyTorch sees them."""

from __future__ import annotations

import torch


def visible() -> list[torch.device]:
    """Those that this process may use."""
    return [torch.device("cuda", number) for number in range(torch.cuda.device_count())]


def free_memory(device: torch.device) -> int:
    """Bytes that are free on a GPU."""
    return int(torch.cuda.mem_get_info(device)[0])
