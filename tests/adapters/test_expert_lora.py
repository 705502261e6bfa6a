"""The LoRA of one layer's experts."""

from __future__ import annotations

import torch
from helpers.expert_tensors import SHAPE, experts_tensors, save

from llamafactory_kt.adapters import open_adapter


def test_folding_is_exact_for_powers_of_two_and_rounds_once_otherwise(tmp_path):
    from llamafactory_kt.adapters.expert_lora import mantissa

    tensors = experts_tensors(lambda e, p: 4 if e else 5, dtype=torch.bfloat16)
    lora = open_adapter(save(tmp_path, tensors, r=4, lora_alpha=24)).read_layer(2, SHAPE)
    common = mantissa(6.0)
    folded = lora.folded("gate", common)
    assert common == 1.5
    assert torch.equal(folded[1], 4 * lora.b["gate"][1].float())
    assert torch.allclose(folded[0], lora.b["gate"][0].float() * (24 / 5 / 1.5), rtol=1e-6)
