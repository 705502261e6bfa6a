"""The experts as an operator: ``torch.compile`` and ``torch.export`` see through models with KT experts."""

from __future__ import annotations

import contextlib
import gc
import weakref

import pytest
import torch
from helpers.adapters import make_adapter
from helpers.loading import load
from helpers.models import make_model
from helpers.references import merged_float32, per_token, rel
from transformers import CompileConfig, StaticCache

from llamafactory_kt import (
    KTModelError,
    apply_adapter,
    get_router_stats,
    load_moe_lora_from_adapter,
    optimize_for_inference,
    switch_adapter,
)
from llamafactory_kt.model.on_gpu.shared_overlap import SharedExpertsOverlap
from llamafactory_kt.model.operator import experts
from llamafactory_kt.model.state import kt_state

IDS = torch.arange(30, 70).reshape(2, 20)
BACKENDS = ["eager", "aot_eager"]


@pytest.fixture(autouse=True)
def forget_graphs():
    """Graphs of other tests do not count, nor stay."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    root = tmp_path_factory.mktemp("operator")
    model = make_model(root / "model", "deepseek_v2")
    return model, make_adapter(root / "one", model, rank=5), make_adapter(root / "two", model, rank=3, seed=2)


def decoder_layer(model):
    """A layer with experts, and arguments for it: two rows of five tokens."""
    hidden = torch.randn(2, 5, model.config.hidden_size, generator=torch.Generator().manual_seed(0)).to(model.dtype)
    plain = getattr(model, "base_model", model)
    decoder = getattr(plain, "model", plain)
    decoder = getattr(decoder, "model", decoder)
    positions = torch.arange(5)[None]
    embeddings = decoder.rotary_emb(hidden, positions)
    return decoder.layers[1], {"hidden_states": hidden, "position_embeddings": embeddings}


@torch.no_grad()
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_compiled_layer_follows_the_adapters(files, backend):
    """One graph without breaks gives what the layer gives, bit for bit: with an adapter, and with another one later."""
    path, one, two = files
    model, _ = apply_adapter(load(path, "native", adapter=[str(one)]), one)
    found = []
    for adapter in (one, two):
        switch_adapter(model, adapter)
        layer, given = decoder_layer(model)
        found.append(torch.compile(layer, fullgraph=True, backend=backend)(**given))
        assert torch.equal(found[-1], layer(**given))
    assert rel(found[0], found[1]) > 0.03


@torch.no_grad()
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_compiled_model_against_float32(files, backend):
    path, one, two = files
    model, _ = apply_adapter(load(path, "torch", dtype=torch.float32, adapter=[str(one)]), one)
    for adapter in (one, two):
        switch_adapter(model, adapter)
        compiled = torch.compile(
            model.get_base_model(), fullgraph=True, backend=backend
        )  # PEFT's own wrapper breaks it
        found = compiled(input_ids=IDS, use_cache=False).logits
        assert per_token(found, logits_of(merged_float32(path, adapter))) < 1e-4


def logits_of(model):
    return model(input_ids=IDS).logits.float()


@torch.no_grad()
@pytest.mark.parametrize("architecture", ["deepseek_v2", "qwen3_moe"])
def test_a_model_set_up_for_inference_is_compiled(tmp_path, architecture):
    """As in a chat: a prompt as it is, then tokens in one graph of PyTorch's operators on a static cache."""
    path = make_model(tmp_path / "model", architecture)
    adapter = make_adapter(tmp_path / "adapter", path, rank=5)
    model = apply_adapter(load(path, "native", adapter=[str(adapter)]), adapter)[0].get_base_model()
    optimize_for_inference(model)
    cache = StaticCache(config=model.config, max_cache_len=32)
    model(input_ids=IDS[:1, :18], past_key_values=cache)
    compiled, wanted = torch.compile(model, fullgraph=True, backend="eager"), logits_of(merged_float32(path, adapter))
    for place in (18, 19):
        given = {"input_ids": IDS[:1, place : place + 1], "position_ids": torch.tensor([[place]])}
        found = compiled(**given, past_key_values=cache).logits.float()
        assert per_token(found, wanted[:1, place : place + 1]) < 0.1


@pytest.mark.parametrize("compiled", [True, False])
def test_generate_compiles_a_token_where_it_is_asked_to(files, compiled):
    """As on a GPU with a static cache: one graph of all layers, for all tokens, with the experts in it."""
    model, graphs = load(files[0], "native", compile=compiled), []

    def note(graph, _):
        graphs.append([node.target for node in graph.graph.nodes].count(experts))
        return graph.forward

    given = {"input_ids": IDS[:1], "max_new_tokens": 6, "do_sample": False, "cache_implementation": "static"}
    wanted = model.generate(**given)
    config = CompileConfig(fullgraph=True, backend=note, mode=None)
    config._compile_all_devices = True
    assert torch.equal(model.generate(**given, compile_config=config), wanted)
    assert graphs == ([len(kt_state(model).wrappers)] if compiled else [])


@torch.no_grad()
def test_shared_experts_that_may_overlap_are_traced(files):
    """As on a GPU, where a module's forward is replaced."""
    model = load(files[0], "native")
    layer, given = decoder_layer(model)
    wanted = layer(**given)
    layer.mlp.experts.overlap = SharedExpertsOverlap(layer.mlp.shared_experts)
    assert torch.equal(torch.compile(layer, fullgraph=True, backend="eager")(**given), wanted)


@torch.no_grad()
def test_an_exported_layer_computes_the_experts_as_they_are(files):
    """The program holds no weights of experts: it computes with the LoRA that they have when it runs."""
    path, one, _ = files
    model = load(path, "native", lora_rank=5)
    layer, given = decoder_layer(model)
    program = torch.export.export(layer, (), given)
    targets = [node.target for node in program.graph.nodes if node.op == "call_function"]
    assert targets.count(experts) == 1
    assert not any("experts." in name and "shared" not in name for name in program.state_dict)
    before = program.module()(**given)
    assert torch.equal(before, layer(**given))
    load_moe_lora_from_adapter(model, one)
    after = program.module()(**given)
    assert torch.equal(after, layer(**given)) and rel(after, before) > 0.01


@torch.no_grad()
def test_what_the_operator_says_of_its_result_is_so(files):
    """Shape, strides and dtype, as torch checks them."""
    wrapper = kt_state(load(files[0], "native")).wrappers[0]
    hidden = torch.randn(wrapper.hidden_dim, 3).bfloat16().T
    given = hidden, torch.tensor([[0, 1, 2]] * 3), torch.rand(3, 3), wrapper._number
    torch.library.opcheck(experts, given, test_utils=["test_schema", "test_faketensor", "test_aot_dispatch_dynamic"])


@torch.no_grad()
def test_adapters_wait_while_a_graph_computes_experts(files, monkeypatch):
    """A graph has nothing of ``model.forward``'s lock."""
    model = load(files[0], "native")
    state, refused = kt_state(model), []
    compute = type(state.wrappers[0].engine).forward

    def watched(self, *given):
        with contextlib.suppress(RuntimeError), state.lock.exchange():
            return None
        refused.append(self)
        return compute(self, *given)

    monkeypatch.setattr(type(state.wrappers[0].engine), "forward", watched)
    torch.compile(model, fullgraph=True, backend="eager")(input_ids=IDS, use_cache=False)
    assert refused == [wrapper.engine for wrapper in state.wrappers]


@torch.no_grad()
def test_router_statistics_of_a_compiled_model(files):
    """Whoever counts must know the call, so the graph is broken there, and no row of padding is counted."""
    model = load(files[0], "native", router_stats=True)
    mask = torch.ones_like(IDS)
    mask[0, :4] = 0
    given = {"input_ids": IDS, "attention_mask": mask, "use_cache": False}
    wanted = model(**given).logits
    once = {layer: counts.counts.copy() for layer, counts in get_router_stats(model).items()}
    found = torch.compile(model, backend="eager")(**given).logits
    assert torch.equal(found, wanted)
    assert all((counts.counts == 2 * once[layer]).all() for layer, counts in get_router_stats(model).items())


@torch.no_grad()
def test_a_graph_keeps_no_experts_alive(files):
    model = load(files[0], "native")
    layer, given = decoder_layer(model)
    engine, program = weakref.ref(kt_state(model).wrappers[0].engine), torch.export.export(layer, (), given)
    del model, layer
    gc.collect()
    assert engine() is None
    with pytest.raises(KTModelError, match="this process has no layer"):
        program.module()(**given)


def test_gradients_are_refused_as_without_a_graph(files):
    layer, given = decoder_layer(load(files[0], "native"))
    given["hidden_states"].requires_grad_(True)
    with pytest.raises(Exception, match="KT experts are for inference"):
        torch.compile(layer, backend="eager")(**given)
