"""What a model asks of the whole process."""

from __future__ import annotations

from typing import Any

import torch

from ..model.state import kt_state
from ..native.openmp import release_team


def configure_process(model: Any) -> list[str]:
    """Set up this process for a model with KT experts, as LLaMA-Factory's chats with ``use_kt`` do.

    PyTorch's number of threads, and the scheduling class of kt-kernel's workers, become the plan's. With a GPU, PyTorch computes
    attention with its own kernels and not with cuDNN's: cuDNN makes a plan for every length of the cache, in every thread anew,
    and an answer has another length at every token and, in LLaMA-Factory's chats, a thread of its own. PyTorch 2.9 prefers cuDNN
    on GPUs of compute capability 9.0 and 10.0 (``check_prefer_cudnn_attention`` in its sdp_utils.cpp).

    Returns:
        What was set, a line each.

    Raises:
        KTModelError: The model has no KT experts.
    """
    state = kt_state(model)
    state.engine.arrange_process(state.plan)
    release_team()
    done = [f"threads of this process: {state.plan}"]
    if state.on_gpu:
        torch.backends.cuda.enable_cudnn_sdp(False)
        done.append("attention on GPUs: PyTorch's own kernels, not cuDNN's")
    return done
