"""kt-kernel's tasks on a GPU's stream: the stream waits for the CPU, and no Python thread does.

kt-kernel's ``submit_with_cuda_stream`` hands a task to the workers once the stream has come that far, and ``sync_with_cuda_stream`` lets
the stream go on when all tasks are done (both are ``cudaLaunchHostFunc``, ``kt-kernel/cpu_backend/cpuinfer.h``). Neither holds Python's
global lock, as plain ``sync`` does while it waits, so Python queues the GPU's next work meanwhile.
"""

from __future__ import annotations

from typing import Any

from ..base import Stream
from ..streams import note_device

Task = tuple[int, int]
"""addresses of one of kt-kernel's functions and of its arguments (``ForwardBindings`` in its ext_bindings.cpp); may be submitted again"""


def submit(infer: Any, stream: Stream, task: Task) -> None:
    """Queue a task. What it reads and writes must stay in place until the stream has passed the next :func:`join`."""
    note_device(stream.device)
    infer.submit_with_cuda_stream(stream.cuda_stream, task)


def join(infer: Any, stream: Stream) -> None:
    """Let the stream wait for the tasks submitted on it."""
    infer.sync_with_cuda_stream(stream.cuda_stream)
