"""The logits of every architecture, and the effect of LoRA alone, compared with stock transformers with the adapter
merged in float32.

The bound is the error of stock transformers in bfloat16, measured in the same test.
"""

from __future__ import annotations

import pytest
import torch
from helpers.adapters import make_adapter
from helpers.marks import needs_kernel
from helpers.models import ARCHITECTURES, make_model
from helpers.references import merged_float32, per_token, rel
from llamafactory.chat import ChatModel

from llamafactory_kt import KTExpertsConfig, apply_adapter, load_moe_lora_from_adapter
from llamafactory_kt.model.state import kt_state

CHUNK = 24
LAYERS_WITHOUT_LORA = (1,)
CASES = [(name, rank, "A" if rank in (1, 8) else "B") for name in ARCHITECTURES for rank in (1, 5, 8, 64)]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    made = {}

    def get(name: str):
        if name not in made:
            made[name] = make_model(tmp_path_factory.mktemp(name), name)
        return made[name]

    return get


def logits(model, ids: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return model(input_ids=ids).logits.float()


def inputs(seed: int = 3) -> list[torch.Tensor]:
    """A batch of 1 and a batch of 4; the latter is longer than a chunk."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(2, 1000, shape, generator=generator) for shape in ((1, 61), (4, 33))]


def chat_model(model, adapter=None, **keys):
    arguments = {"model_name_or_path": str(model), "template": "deepseek", "use_kt": True, "kt_max_chunk": CHUNK}
    if adapter is not None:
        arguments["adapter_name_or_path"] = str(adapter)
    return ChatModel({**arguments, **keys}).engine.model


@needs_kernel
@pytest.mark.parametrize(("name", "rank", "naming"), CASES)
def test_logits_and_lora_effect(models, tmp_path, name, rank, naming):
    path = models(name)
    naming = "mixtral" if name == "mixtral" and naming == "B" else naming
    adapter = make_adapter(
        tmp_path / "adapter", path, rank=rank, alpha=3 * rank, naming=naming, skip_layers=LAYERS_WITHOUT_LORA
    )
    ours = chat_model(path, adapter, kt_backend="AMXBF16")
    reference = {on: merged_float32(path, adapter if on else None) for on in (True, False)}
    stock = {on: merged_float32(path, adapter if on else None, dtype=torch.bfloat16) for on in (True, False)}
    for ids in inputs():
        wanted = {on: logits(reference[on], ids) for on in (True, False)}
        noise = {on: logits(stock[on], ids) for on in (True, False)}
        found = {True: logits(ours, ids)}
        for wrapper in kt_state(ours).wrappers:
            wrapper.engine.set_lora(None)
        with ours.disable_adapter():
            found[False] = logits(ours, ids)
        load_moe_lora_from_adapter(ours, adapter)

        effect = wanted[True] - wanted[False]
        assert rel(wanted[True], wanted[False]) > 0.1, "the adapter must change something"
        errors = [per_token(found[on], wanted[on]) for on in (True, False)]
        errors.append(per_token(found[True] - found[False], effect))
        bounds = [per_token(noise[on], wanted[on]) for on in (True, False)]
        bounds.append(per_token(noise[True] - noise[False], effect))
        print(
            name, rank, ids.shape[0], "ours/stock:", [f"{e:.4f}/{b:.4f}" for e, b in zip(errors, bounds, strict=True)]
        )
        for error, bound in zip(errors, bounds, strict=True):
            assert error < 2 * bound


def test_torch_engine_is_exact(models, tmp_path):
    """In a float32 model it differs from the reference by nothing but the order of sums."""
    path = make_model(tmp_path / "model", "deepseek_v3", dtype=torch.bfloat16)
    adapter = make_adapter(tmp_path / "adapter", path, rank=5, skip_layers=LAYERS_WITHOUT_LORA, naming="A")
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, quantization_config=KTExpertsConfig(backend="torch", adapter=str(adapter))
    )
    model, report = apply_adapter(model, adapter)
    assert report.experts + report.peft == report.total
    for ids in inputs():
        assert rel(logits(model, ids), logits(merged_float32(path, adapter), ids)) < 2e-5
