"""The output layer, for the last token alone."""

from __future__ import annotations

from typing import ClassVar

import torch
from helpers.loading import load
from helpers.models import make_model
from torch.utils._python_dispatch import TorchDispatchMode

from llamafactory_kt import optimize_for_inference


def test_the_last_tokens_logits_do_not_copy_the_output_layer(tmp_path):
    """torch multiplies a slice of the last token batch by batch and copies the weight, unless the slice has contiguous
    strides."""
    model = load(make_model(tmp_path / "m", "deepseek_v2"), "torch", dtype=torch.float32).requires_grad_(False)

    class Seen(TorchDispatchMode):
        names: ClassVar[list[str]] = []

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if any(isinstance(arg, torch.Tensor) and model.config.vocab_size in arg.shape for arg in args):
                self.names.append(func.overloadpacket.__name__)
            return func(*args, **(kwargs or {}))

    ids = torch.arange(2, 32).view(2, 15)
    with torch.no_grad():
        whole = model(input_ids=ids).logits[:, -1:]
        optimize_for_inference(model)
        with Seen() as seen:
            last = model(input_ids=ids, logits_to_keep=1).logits
    assert "mm" in seen.names, seen.names
    assert not {"bmm", "copy_", "clone"} & set(seen.names)
    assert torch.allclose(last.float(), whole.float(), atol=1e-2)
