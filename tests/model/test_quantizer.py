"""Loading a model with KT experts: what is read, what is refused, and what may be done to the model afterwards."""

from __future__ import annotations

import copy
import gc

import pytest
import torch
from helpers.adapters import make_adapter
from helpers.loading import answer, load
from helpers.marks import needs_kernel
from helpers.models import make_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from llamafactory_kt import KTAdapterError, KTExpertsConfig, apply_adapter
from llamafactory_kt.engines.reference import ReferenceEngine
from llamafactory_kt.ground import machine
from llamafactory_kt.model.state import kt_state

pytestmark = pytest.mark.usefixtures("worker_threads")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    root = tmp_path_factory.mktemp("files")
    model = make_model(root / "model", "deepseek_v2")
    return model, make_adapter(root / "a", model, rank=4), make_adapter(root / "b", model, rank=12, seed=7, naming="A")


@needs_kernel
def test_pointers_survive_what_users_do_to_a_model(files):
    path, adapter, _ = files
    model, _ = apply_adapter(load(path, adapter=str(adapter)), adapter)
    before = answer(model)
    model.to("cpu").eval().requires_grad_(False)
    other, _ = apply_adapter(load(path), adapter)
    assert torch.equal(answer(other), before)
    del other
    gc.collect()
    junk = [torch.randn(64, 96) for _ in range(1000)]  # what would overwrite freed memory
    assert torch.equal(answer(model), before) and junk
    assert not list(kt_state(load(path)).wrappers[0].parameters())
    with pytest.raises(TypeError, match="cannot be copied"):
        copy.deepcopy(model)


@needs_kernel
def test_models_of_different_sizes_in_one_process(files, tmp_path):
    path, _, _ = files
    small = load(path)
    before = answer(small)
    large = load(make_model(tmp_path / "large", "qwen3_moe", hidden_size=160, num_experts=9, num_experts_per_tok=5))
    answer(large)
    assert torch.equal(answer(small), before)


def test_not_enough_memory_is_said_before_reading(files, monkeypatch):
    from llamafactory_kt import KTMemoryError
    from llamafactory_kt.model import memory

    monkeypatch.setattr(memory, "available_memory", lambda: 100_000)
    with pytest.raises(KTMemoryError, match=r"The experts of 2 layers need .* are free"):
        load(files[0], backend="torch")
    assert machine.available_memory() > 100_000


def test_generation_is_inference_only(files):
    model = load(files[0], backend="torch")
    model.get_input_embeddings().weight.requires_grad_(True)
    with pytest.raises(RuntimeError, match="for inference"):
        model(input_ids=torch.arange(2, 10)[None])


def test_no_expert_tensor_is_read_by_transformers_and_none_is_called_unexpected(tmp_path, capsys):
    path = make_model(tmp_path / "m", "deepseek_v2")

    def load_with_info():
        config = KTExpertsConfig(backend="torch")
        return AutoModelForCausalLM.from_pretrained(path, quantization_config=config, output_loading_info=True)

    model, info = load_with_info()
    assert not info["unexpected_keys"] and not info["missing_keys"]
    assert not [name for name, _ in model.named_parameters() if ".experts." in name]
    tensors = load_file(path / "model.safetensors")
    save_file(
        {**tensors, "model.layers.1.mlp.something.weight": torch.ones(1)}, path / "model.safetensors", {"format": "pt"}
    )
    _, info = load_with_info()
    assert info["unexpected_keys"] == {"model.layers.1.mlp.something.weight"}, "only the experts are silenced"


def test_a_peft_that_cannot_be_used_is_refused_before_weights_are_read(tmp_path, monkeypatch):
    path = make_model(tmp_path / "model", "qwen3_moe")
    adapter = make_adapter(tmp_path / "adapter", path)
    monkeypatch.setenv("LLAMAFACTORY_KT_WITHOUT", "peft-layers")
    monkeypatch.setattr(ReferenceEngine, "load", lambda self: pytest.fail("weights were read"))
    with pytest.raises(KTAdapterError, match="LoRA outside the routed experts is applied by PEFT"):
        load(path, "torch", adapter=[str(adapter)])
