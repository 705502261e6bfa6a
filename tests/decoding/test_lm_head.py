"""The head for the last token alone."""

from __future__ import annotations

from typing import ClassVar

import torch
from helpers.models import make_model
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM

from llamafactory_kt import KTExpertsConfig


def load(path, backend="torch", **keys):
    config = KTExpertsConfig(backend=backend)
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, quantization_config=config, **keys)


def test_the_last_tokens_logits_do_not_copy_the_output_layer(tmp_path):
    """torch multiplies a cut-out last token batch by batch, with the weight copied, unless it comes with strides of its own."""
    model = load(make_model(tmp_path / "m", "deepseek_v2")).requires_grad_(False)

    class Seen(TorchDispatchMode):
        names: ClassVar[list[str]] = []

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if any(isinstance(arg, torch.Tensor) and model.config.vocab_size in arg.shape for arg in args):
                self.names.append(func.overloadpacket.__name__)
            return func(*args, **(kwargs or {}))

    ids = torch.arange(2, 32).view(2, 15)
    with torch.no_grad():
        whole = model(input_ids=ids).logits[:, -1:]
        with Seen() as seen:
            last = model(input_ids=ids, logits_to_keep=1).logits
    assert "mm" in seen.names, seen.names
    assert not {"bmm", "copy_", "clone"} & set(seen.names)
    assert torch.allclose(last.float(), whole.float(), atol=1e-2)
