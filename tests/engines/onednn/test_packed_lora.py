"""An expert's LoRA as the oneDNN engine multiplies it."""

from __future__ import annotations

import torch
from helpers.experts import lora_for

from llamafactory_kt.adapters import ExpertsShape
from llamafactory_kt.engines.onednn.lora import PackedLora, lora_size


def test_against_each_experts_change_of_its_weights():
    """Compared with ΔW in float64."""
    shape = ExpertsShape(9, 40, 24)
    lora = lora_for(shape, rank=5, scaling=3.2)
    packed = PackedLora(lora)
    assert packed.nbytes == lora_size(shape, rank=5), "as MemoryNeed has it"
    for expert, (a, b, down_a, down_b) in enumerate(packed.each):
        assert {factor.dtype for factor in (a, b, down_a, down_b)} == {torch.float32}
        for found, projections in (
            (a.double() @ b.double(), ("gate", "up")),
            (down_a.double() @ down_b.double(), ("down",)),
        ):
            wanted = torch.cat([lora.delta(projection, expert).double().T for projection in projections], dim=1)
            torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)
