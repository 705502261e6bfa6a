"""Packing a layer into ``.kt`` files, done by kt-kernel's own kernels."""

from __future__ import annotations

from pathlib import Path

import torch

from ...checkpoint.expert_weights import LayerWeights
from ...ground.machine import usable_cores
from ...ground.process import require_own_process
from .cpuinfer import worker_pool
from .methods import Method
from .runtime import kernel_lock, quiet_stdout


def write_packed(
    method: Method,
    layer: int,
    num_experts_per_tok: int,
    weights: LayerWeights,
    root: Path,
    pools: int,
    threads: int | None,
) -> None:
    """Let kt-kernel pack one layer (gate, up, down in bf16, padded) into ``root/_layer_{layer}/_numa_*/*.kt``.

    The memory of the packed weights is not given back (kt-kernel 0.7.2).
    """
    from kt_kernel import kt_kernel_ext

    require_own_process()
    experts, intermediate, hidden = weights.gate.shape
    mask, every = torch.zeros(experts, dtype=torch.bool), torch.arange(experts)
    with kernel_lock, quiet_stdout():
        infer = worker_pool(max(pools, threads or usable_cores()), pools)
        config = kt_kernel_ext.moe.MOEConfig(experts, num_experts_per_tok, hidden, intermediate, mask.data_ptr())
        config.layer_idx, config.pool, config.max_len = layer, infer.backend_, 32
        config.save, config.load, config.path = True, False, str(root)
        config.gate_proj, config.up_proj, config.down_proj = (
            tensor.data_ptr() for tensor in (weights.gate, weights.up, weights.down)
        )
        moe = getattr(kt_kernel_ext.moe, method.packer)(config)
        infer.submit(moe.load_weights_task(every.data_ptr()))
        infer.sync()
