"""With a GPU: it holds everything but the experts, and tokens cross to the CPU and back. Skipped where there is none."""

from __future__ import annotations

import functools
import gc
import threading

import pytest
import torch
from helpers.adapters import make_adapter
from helpers.fp8 import make_fp8
from helpers.marks import ENGINES, needs_kernel
from helpers.models import make_model
from helpers.references import merged_float32, per_token, rel
from transformers import AutoModelForCausalLM, StaticCache

from llamafactory_kt import (
    KTExpertsConfig,
    apply_adapter,
    get_router_stats,
    load_moe_lora_from_adapter,
    optimize_for_inference,
    switch_adapter,
)
from llamafactory_kt.adapters import open_adapters
from llamafactory_kt.decoding.generate import generate, keep_prompts
from llamafactory_kt.decoding.lora_linear import InferenceLora
from llamafactory_kt.model.experts_module import KTExperts
from llamafactory_kt.model.state import kt_state
from llamafactory_kt.tools.bench.memory import ModelBytes
from llamafactory_kt.tools.bench.stock import merge_into

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="no GPU on this machine, or hidden as by make test"
)
IDS = torch.arange(2, 40)[None]


@pytest.fixture(scope="module", params=["deepseek_v2", "qwen3_moe"])
def files(request, tmp_path_factory):
    """A model with shared experts or one without; an adapter of rank 5, and one of rank 3 on fewer layers."""
    root = tmp_path_factory.mktemp(request.param)
    model = make_model(root / "model", request.param)
    return model, make_adapter(root / "one", model, rank=5), make_adapter(root / "two", model, rank=3, skip_layers=(1,), seed=2)  # fmt: skip


def load(path, **keys):
    device_map, config = keys.pop("device_map", {"": 0}), KTExpertsConfig(**keys)
    return AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.bfloat16, quantization_config=config, device_map=device_map
    )


@torch.inference_mode()
def answer(model):
    return model(input_ids=IDS.to(model.device)).logits.float().cpu()


@pytest.mark.parametrize("way", ["unmerged", "prepared", "merged"])
@pytest.mark.parametrize("backend", ENGINES)
def test_logits_against_float32(files, backend, way):
    """The whole, and the adapter's effect."""
    path, adapter, _ = files
    base = answer(load(path, backend=backend))
    model = apply_adapter(load(path, backend=backend, adapter=str(adapter), merge_adapter=way == "merged"), adapter)[0]
    if way == "prepared":
        optimize_for_inference(model)
        assert any(type(module) is InferenceLora for module in model.modules())
    whole = answer(model)
    wanted = answer(merged_float32(path, None)), answer(merged_float32(path, adapter))
    assert per_token(whole, wanted[1]) < 0.1
    effects = (whole - base).flatten(), (wanted[1] - wanted[0]).flatten()
    assert torch.cosine_similarity(*effects, dim=0) > 0.99
    assert rel(wanted[1], wanted[0]) > 0.3


@needs_kernel
def test_four_bits_are_rounded_as_without_a_gpu(files):
    path, adapter, _ = files
    config = {"backend": "AMXINT4", "adapter": str(adapter)}
    there = answer(apply_adapter(load(path, **config), adapter)[0])
    here = answer(apply_adapter(load(path, **config, device_map={"": "cpu"}), adapter)[0])
    assert per_token(there, here) < 0.1


@pytest.mark.parametrize("backend", ENGINES)
@pytest.mark.parametrize("router_stats", [False, True], ids=["", "router_stats"])
def test_a_layer_waits_once_at_most(files, backend, router_stats):
    """The result is the CPU engine's own. torch sees no wait, and CUDA one, for what crosses; none where the stream
    waits."""
    experts = kt_state(load(files[0], backend=backend, router_stats=router_stats)).wrappers[0]
    hidden = torch.randn(7, experts.hidden_dim, device="cuda", dtype=torch.bfloat16)
    index = torch.rand(7, experts.num_experts, device="cuda").topk(experts.info.num_experts_per_tok).indices
    weights = torch.rand(index.shape, device="cuda")
    with torch.inference_mode():
        wanted = experts.engine.forward(hidden.cpu(), index.cpu(), weights.cpu())
        experts(hidden, index, weights)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            with torch.profiler.profile() as profile:
                out = experts(hidden, index, weights)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert torch.equal(out.cpu(), wanted)
    waits = [event.name for event in profile.events() if "Synchronize" in event.name]
    queued = experts.engine.streams and not router_stats
    assert waits.count("cudaEventSynchronize") == (0 if queued else 1) and waits.count("cudaStreamSynchronize") == 0
    # the profiler waits for the device when it ends
    assert waits.count("cudaDeviceSynchronize") <= 1


def test_shared_experts_are_queued_before_the_wait(tmp_path):
    model = load(make_model(tmp_path / "model", "deepseek_v2"), backend="torch")
    answer(model)
    with torch.inference_mode(), torch.profiler.profile() as profile:
        model(input_ids=IDS[:, :1].cuda())
    order = [
        "wait" if event.name == "cudaEventSynchronize" else "silu"
        for event in sorted(profile.events(), key=lambda event: event.time_range.start)
        if event.name in ("cudaEventSynchronize", "aten::silu")
    ]
    # a dense layer, then of each other: the shared experts, the wait for the tokens, the routed experts on the CPU
    names = [event.name for event in profile.events()]
    assert order[:3] == ["silu", "silu", "wait"], names
    assert order.count("wait") == len(kt_state(model).wrappers)


@pytest.mark.parametrize("keys", [{"backend": "torch"}, {"backend": "native", "router_stats": True}], ids=str)
def test_a_cuda_graph_that_needs_a_thread_is_declined(files, keys):
    experts = kt_state(load(files[0], **keys)).wrappers[0]
    hidden = torch.randn(1, experts.hidden_dim, device="cuda", dtype=torch.bfloat16)
    index = torch.zeros(1, experts.info.num_experts_per_tok, device="cuda", dtype=torch.long)
    with (
        torch.inference_mode(),
        pytest.raises(RuntimeError, match="cannot be captured in a CUDA graph"),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        experts(hidden, index, torch.ones(index.shape, device="cuda"))


def test_a_static_cache_answers_as_a_growing_one(files):
    model = load(files[0])
    given = {"input_ids": IDS.cuda(), "max_new_tokens": 8, "do_sample": False}
    assert torch.equal(model.generate(**given), model.generate(**given, cache_implementation="static"))


@torch.no_grad()
def test_a_cuda_graph_holds_a_layers_experts(files):
    """A MoE block with router and shared experts, captured once: replayed with other tokens, and with another LoRA of another rank."""
    path, one, two = files
    model = load(path, backend="native", lora_rank=5)
    block = next(part for part in model.modules() if isinstance(getattr(part, "experts", None), KTExperts))
    hidden = torch.zeros(1, 1, model.config.hidden_size, device="cuda", dtype=torch.bfloat16)
    block(hidden)  # what is made on first use
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = block(hidden)
    out = out[0] if isinstance(out, tuple) else out
    effects = []
    for number, adapter in enumerate((None, one, two)):
        if adapter is not None:
            load_moe_lora_from_adapter(model, adapter)
        for seed in (2 * number, 2 * number + 1):
            hidden.copy_(torch.randn(hidden.shape, generator=torch.Generator().manual_seed(seed)))
            graph.replay()
            wanted = block(hidden)
            wanted = wanted[0] if isinstance(wanted, tuple) else wanted
            torch.cuda.synchronize()
            assert torch.equal(out, wanted)
        effects.append(out.clone())
    assert rel(effects[1], effects[2]) > 0.01


@torch.no_grad()
@pytest.mark.parametrize("backend", ["eager", "cudagraphs"])
def test_a_compiled_model_on_a_static_cache(files, backend):
    """A token's way through the whole model in one graph, which CUDA holds in the second case; the experts are one operator of it."""
    torch._dynamo.reset()
    path, one, _ = files
    model = apply_adapter(load(path, backend="native", adapter=str(one)), one)[0].get_base_model()
    optimize_for_inference(model)
    compiled, ids = torch.compile(model, fullgraph=True, backend=backend), IDS.cuda()
    plain, static = (StaticCache(config=model.config, max_cache_len=64) for _ in range(2))
    model(input_ids=ids[:, :20], past_key_values=plain)
    model(input_ids=ids[:, :20], past_key_values=static)
    for place in range(20, 30):
        given = {"input_ids": ids[:, place : place + 1], "position_ids": torch.tensor([[place]], device="cuda")}
        found = compiled(**given, past_key_values=static).logits
        assert per_token(found.float(), model(**given, past_key_values=plain).logits.float()) < 0.05
    torch._dynamo.reset()


def test_generate_compiles_into_a_cuda_graph(files):
    """What transformers does for a static cache; the same answer, also after an exchange of the experts' LoRA."""
    torch._dynamo.reset()
    path, one, _ = files
    plain, model = (load(path, backend="native", lora_rank=5, compile=compiled) for compiled in (False, True))
    given = {"input_ids": IDS.cuda(), "max_new_tokens": 8, "do_sample": False, "cache_implementation": "static"}
    assert torch.equal(model.generate(**given), plain.generate(**given))
    for each in (model, plain):
        load_moe_lora_from_adapter(each, one)
    assert torch.equal(model.generate(**given), plain.generate(**given))
    torch._dynamo.reset()


def test_chats_at_once(files):
    """Threads that share the buffers answer as they do alone, and router statistics count the same."""
    model = load(files[0], router_stats=True)
    prompts = [IDS[:, start:].cuda() for start in range(4)]

    def generate(ids):
        return model.generate(input_ids=ids, max_new_tokens=12, do_sample=False)

    alone, together = [generate(ids) for ids in prompts], [None] * 4
    once = {layer: counts.counts.copy() for layer, counts in get_router_stats(model).items()}

    def work(number):
        together[number] = generate(prompts[number])

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert all(torch.equal(*pair) for pair in zip(alone, together, strict=True))
    assert all((counts.counts == 2 * once[layer]).all() for layer, counts in get_router_stats(model).items())


def test_exchanging_adapters_and_unloading(files):
    path, one, two = files
    gc.collect()
    torch._C._cuda_clearCublasWorkspaces()
    before = torch.cuda.memory_allocated()
    model = apply_adapter(load(path, adapter=str(one)), one)[0]
    optimize_for_inference(model)
    first = answer(model)
    wanted = {adapter: answer(merged_float32(path, adapter)) for adapter in (one, two)}
    assert rel(wanted[one], wanted[two]) > 0.3
    assert per_token(first, wanted[one]) < 0.1
    for adapter in (two, one):
        switch_adapter(model, adapter)
        assert per_token(answer(model), wanted[adapter]) < 0.1
    assert {parameter.device.type for parameter in model.parameters()} == {"cuda"}
    model.to("cpu")
    assert per_token(answer(model), wanted[one]) < 0.1
    del model
    gc.collect()
    torch._C._cuda_clearCublasWorkspaces()  # which torch keeps for each thread
    assert torch.cuda.memory_allocated() <= before


def test_fp8_checkpoint(tmp_path):
    sizes = {"hidden_size": 192, "moe_intermediate_size": 160, "kv_lora_rank": 136}
    source = make_model(tmp_path / "source", "deepseek_v3", dtype=torch.float32, **sizes)
    fp8, plain = make_fp8(tmp_path, source, [128, 128])
    model = load(fp8)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert per_token(answer(model), answer(merged_float32(plain, None))) < 0.1


def test_llamafactory_puts_everything_but_the_experts_on_it(files):
    from llamafactory.chat import ChatModel

    path, adapter, _ = files
    gc.collect()
    before = torch.cuda.memory_allocated()
    arguments = {"model_name_or_path": str(path), "template": "deepseek", "use_kt": True}
    chat = ChatModel({**arguments, "adapter_name_or_path": str(adapter)})
    model = chat.engine.model
    assert {parameter.device.type for parameter in model.parameters()} == {"cuda"}
    held = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    assert torch.cuda.memory_allocated() - before < held + 2**20, "no byte of a routed expert may be on the GPU"
    assert per_token(answer(model), answer(merged_float32(path, adapter))) < 0.1
    assert len("".join(chat.stream_chat([{"role": "user", "content": "hello"}], max_new_tokens=8))) > 0


@torch.no_grad()
def test_stock_that_it_does_not_hold(tmp_path):
    """What the bench compares with on the machines that KT experts are for: accelerate copies layers to the GPU for
    each call."""
    path = make_model(tmp_path / "model", "qwen3_moe")
    adapter = make_adapter(tmp_path / "adapter", path)
    places = {"model.embed_tokens": 0, "model.layers": "cpu", "model.norm": 0, "model.rotary_emb": 0, "lm_head": 0}
    stock = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16, device_map=places)
    base, size = answer(stock), ModelBytes.of(stock).weights
    merged = merge_into(stock, open_adapters([adapter]))
    whole = answer(merged)
    wanted = answer(merged_float32(path, None)), answer(merged_float32(path, adapter))
    assert per_token(whole, wanted[1]) < 0.1
    assert torch.cosine_similarity((whole - base).flatten(), (wanted[1] - wanted[0]).flatten(), dim=0) > 0.99
    assert ModelBytes.of(merged).weights == size > 0
    assert {p.is_meta for p in merged.model.layers.parameters()} == {True}


def test_attention_makes_no_plans(files):
    """cuDNN would make a new plan for every length. Other tests' loads have switched it off, so this test switches it
    on first."""
    torch.backends.cuda.enable_cudnn_sdp(True)
    load(files[0], backend="torch")
    assert not torch.backends.cuda.cudnn_sdp_enabled()


def test_earlier_prompts_lie_in_the_memory_of_the_cpu(files):
    path, adapter, _ = files
    model = apply_adapter(load(path, backend="torch", adapter=str(adapter)), adapter)[0]
    optimize_for_inference(model)
    state = kt_state(model)
    keep_prompts(state, gib=1)

    class Reading:
        cached_tokens = 0

        def read(self, tokens):
            return True

    def ask(ids, kept=True):
        reading = Reading()
        custom = {"custom_generate": functools.partial(generate, reading=reading)} if kept else {}
        found = model.generate(inputs=ids, do_sample=False, max_new_tokens=4, pad_token_id=1, **custom)
        return found, reading.cached_tokens

    first, _ = ask(IDS.cuda())
    assert {layer.keys.device.type for kept in state.prompts._kept for layer in kept.cache.layers} == {"cpu"}
    turn = torch.cat((first, torch.arange(100, 120, device="cuda")[None]), 1)
    found, cached = ask(turn)
    assert cached == first.shape[1] - 1 and torch.equal(found, ask(turn, kept=False)[0])


@pytest.mark.parametrize("backend", ["native", "torch"])
def test_experts_on_it(files, backend):
    """Those with the lowest numbers and others, with two adapters and none; and as many as fit."""
    path, one, two = files
    plain = load(path, backend=backend, adapter=str(one))
    model = load(path, backend=backend, adapter=str(one), gpu_experts=3, router_stats=True)
    splits = kt_state(model).placement.layers
    assert len(splits) == len(kt_state(model).wrappers) and {split.device.type for split in splits} == {"cuda"}
    assert per_token(answer(model), answer(plain)) < 0.05
    for split in splits:
        split.place([5, 1, 4])
    model, plain = (optimized(apply_adapter(each, one)[0]) for each in (model, plain))
    for adapter in (one, two, None):
        for each in (model, plain):
            switch_adapter(each, adapter)
        found, wanted = answer(model), answer(merged_float32(path, adapter))
        assert per_token(found, answer(plain)) < 0.05 and per_token(found, wanted) < 0.1
    given = {"input_ids": IDS.cuda(), "max_new_tokens": 40, "min_new_tokens": 40, "do_sample": False}
    for _ in range(5):
        model.generate(**given)
    assert kt_state(model).placement.counted >= 256
    assert per_token(answer(model), answer(plain)) < 0.05
    assert {entry.tokens for entry in get_router_stats(model).values()} == {splits[0].usage.tokens}
    every = load(path, backend=backend, gpu_experts="auto")
    assert [split.count for split in kt_state(every).placement.layers] == [6] * len(splits)
    assert per_token(answer(every), answer(load(path, backend=backend))) < 0.05


def optimized(model):
    optimize_for_inference(model)
    return model


@torch.inference_mode()
@pytest.mark.parametrize("tokens", [1, 9])
def test_experts_on_it_are_summed_in_float32(files, tokens):
    """As the CPU sums them; of the factors, what the activation gives is rounded to bfloat16, too."""
    experts = kt_state(load(files[0], backend="torch", gpu_experts=3)).wrappers[0]
    hidden = torch.randn(tokens, experts.hidden_dim, generator=torch.Generator().manual_seed(0)).bfloat16()
    index = torch.tensor([[0, 2, 5], [1, 2, 0], [3, 4, 5]]).repeat(3, 1)[:tokens]
    weights = torch.rand(tokens, 3, generator=torch.Generator().manual_seed(1))
    wanted = experts.engine.forward(hidden.float(), index, weights)
    split = experts.split
    marked = split.mark(index.cuda()).cpu()
    here = split.compute(hidden.cuda(), marked, weights.cuda())
    rest = experts.engine.forward(hidden.float(), marked, weights)
    assert here.dtype == torch.float32 and rel(here.cpu() + rest, wanted) < 0.004


@torch.inference_mode()
def test_experts_on_it_are_computed_meanwhile(files):
    """The engine is started before Python waits for what was chosen."""
    model = load(files[0], backend="native", gpu_experts=3)
    answer(model)
    with torch.profiler.profile() as profile:
        model(input_ids=IDS[:, :1].cuda())
    names = [event.name for event in sorted(profile.events(), key=lambda event: event.time_range.start)]
    order = [name for name in names if name in ("cudaLaunchHostFunc", "cudaEventSynchronize")]
    assert order == ["cudaLaunchHostFunc", "cudaEventSynchronize", "cudaLaunchHostFunc"] * len(kt_state(model).wrappers)
