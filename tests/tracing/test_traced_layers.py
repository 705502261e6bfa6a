"""Tokens that decoder layers compute in one call each, compared with the same model's layers as they are."""

from __future__ import annotations

import contextlib
import functools
import gc
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from helpers.adapters import make_adapter
from helpers.architectures import tiny_model
from helpers.experts import lora_for
from helpers.loading import load
from helpers.marks import needs_native
from helpers.models import ARCHITECTURES, make_model
from helpers.references import rel
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn
from torch.utils import _python_dispatch
from transformers import DynamicCache

from llamafactory_kt import apply_adapter, get_router_stats, optimize_for_inference, reset_router_stats, switch_adapter
from llamafactory_kt.model.experts_module import KTExperts
from llamafactory_kt.native.library import byref, kernels
from llamafactory_kt.tracing import chain, layers
from llamafactory_kt.tracing.call import MOST
from llamafactory_kt.tracing.chain import Chain
from llamafactory_kt.tracing.layers import TracedLayer
from llamafactory_kt.tracing.recorder import record

pytestmark = needs_native
ROUNDING = 1e-5
"""of float32 sums in another order"""


def traced(model: nn.Module) -> list[tuple[nn.Module, TracedLayer]]:
    found = ((module, vars(module).get("forward")) for module in model.modules())
    return [(module, forward) for module, forward in found if isinstance(forward, TracedLayer)]


@contextlib.contextmanager
def untraced(model: nn.Module) -> Iterator[None]:
    own = traced(model)
    for module, _ in own:
        del module.forward
    yield
    for module, forward in own:
        module.forward = forward


class Conversation:
    """Sequences of random tokens.

    Args:
        padded: tokens that the first sequence has less than the others.
    """

    def __init__(self, model: nn.Module, seed: int, batch: int = 1, padded: int = 0, length: int = 12):
        self.model, self.random = model, torch.Generator().manual_seed(seed)
        ids = self.tokens(batch, length + seed)
        self.mask = torch.ones_like(ids)
        self.mask[0, :padded] = 0
        self.cache = None
        self.next(ids)

    def tokens(self, *size: int) -> torch.Tensor:
        return torch.randint(2, 1000, size, generator=self.random)

    @torch.inference_mode()
    def next(self, ids: torch.Tensor | None = None, **more) -> torch.Tensor:
        """The logits of one more token of each sequence; or what the model returns, with ``more``."""
        if ids is None:
            ids = self.tokens(len(self.mask), 1)
            self.mask = torch.cat((self.mask, torch.ones_like(ids)), 1)
        mask = None if "output_router_logits" in more else self.mask  # with which transformers cannot count them
        out = self.model(input_ids=ids, attention_mask=mask, past_key_values=self.cache, use_cache=True, **more)
        self.cache = out.past_key_values
        return out if more else out.logits[:, -1].float()


def tokens(model: nn.Module, seed: int = 0, count: int = 6, **sizes: int) -> torch.Tensor:
    conversation = Conversation(model, seed, **sizes)
    return torch.stack([conversation.next() for _ in range(count)])


def expected(model: nn.Module, *args, **keys) -> torch.Tensor:
    with untraced(model):
        return tokens(model, *args, **keys)


@pytest.fixture
def runs(monkeypatch) -> list[int]:
    """The layers that were computed as programs: a number for each layer and token."""
    calls, stock = [], Chain.run

    def run(self, *given):
        calls.extend(range(len(self.programs)))
        return stock(self, *given)

    monkeypatch.setattr(Chain, "run", run)
    return calls


def made(
    directory: Path, architecture: str, dtype: torch.dtype = torch.float32, engine: str = "native", **keys
) -> nn.Module:
    model = load(make_model(directory / "model", architecture, dtype=dtype), engine, dtype=dtype, **keys)
    optimize_for_inference(model)
    return model


@pytest.fixture(scope="module")
def qwen(tmp_path_factory) -> nn.Module:
    return made(tmp_path_factory.mktemp("qwen"), "qwen3_moe")


@pytest.fixture
def with_adapters(tmp_path) -> tuple[nn.Module, Path, Path]:
    path = make_model(tmp_path / "model", "qwen3_moe", dtype=torch.float32)
    one = make_adapter(tmp_path / "one", path, rank=5, alpha=10)
    two = make_adapter(tmp_path / "two", path, rank=3, alpha=4, seed=2)
    model = load(path, "native", dtype=torch.float32, adapter=[str(one), str(two)])
    model, _ = apply_adapter(model, one)
    optimize_for_inference(model)
    return model, one, two


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture(tmp_path, architecture, runs):
    """Conversations in turn and interleaved, and batches with and without padding; all but the first two tokens of each kind."""
    model = made(tmp_path, architecture)
    every = len(traced(model))
    assert every == model.config.num_hidden_layers
    for seed, (batch, padded) in enumerate([(1, 0), (1, 0), (2, 0), (3, 5), (2, 3), (3, 0)]):
        sizes = {"batch": batch, "padded": padded}
        wanted = expected(model, seed, **sizes)
        assert not runs
        assert rel(tokens(model, seed, **sizes), wanted) < ROUNDING, sizes
        assert len(runs) >= every * (6 if seed == 1 else 4), sizes
        runs.clear()
    with untraced(model):
        wanted = [tokens(model, seed) for seed in (7, 8)]
    both = [Conversation(model, seed) for seed in (7, 8)]
    found = [torch.stack(parts) for parts in zip(*([c.next() for c in both] for _ in range(6)), strict=True)]
    assert all(rel(one, other) < ROUNDING for one, other in zip(found, wanted, strict=True))
    assert rel(*wanted) > 0.5
    assert len(runs) == 2 * 6 * every


@pytest.mark.parametrize("architecture", ["qwen3_next", "jamba", "lfm2_moe"])
def test_layers_with_states_of_their_own(tmp_path, architecture, runs):
    """Convolutions and linear attention change them in place, in inference mode; one layer of the three has keys and values."""
    tiny_model(architecture).save_pretrained(tmp_path)
    model = load(tmp_path, "native", dtype=torch.float32)
    optimize_for_inference(model)
    for seed, batch in enumerate((1, 1, 2)):
        wanted = expected(model, seed, batch=batch)
        assert rel(tokens(model, seed, batch=batch), wanted) < ROUNDING
    assert 4 + 6 <= len(runs) <= 2 * (4 + 6 + 4)


@pytest.mark.parametrize("architecture", ["glm4_moe", "qwen3_moe"])
def test_in_bfloat16_with_lora(tmp_path, architecture, runs):
    path = make_model(tmp_path / "model", architecture)
    adapter = make_adapter(tmp_path / "adapter", path, rank=5, alpha=10)
    model, _ = apply_adapter(load(path, "native", adapter=str(adapter)), adapter)
    optimize_for_inference(model)
    wanted, found = (call(model, 3, 12).flatten(0, 1) for call in (expected, tokens))
    assert ((found - wanted).norm(dim=-1) / wanted.norm(dim=-1)).median() < 1e-3, "roundings, and routers near a tie"
    assert len(runs) == 10 * 3


def test_long_conversations(qwen, runs):
    """The cache moves to new memory several times."""
    count, wanted = 300, expected(qwen, 1, 300)
    assert rel(tokens(qwen, 1, count), wanted) < ROUNDING and len(runs) >= 3 * (count - 2)


def test_an_adapter_is_switched(with_adapters, runs):
    model, one, two = with_adapters
    seen = []
    for adapter in (one, two, None, one):
        switch_adapter(model, adapter)
        wanted = expected(model)
        runs.clear()
        assert rel(tokens(model), wanted) < ROUNDING and len(runs) == 4 * 3
        seen.append(wanted)
    assert torch.equal(seen[0], seen[3])
    assert all(rel(seen[a], seen[b]) > 0.02 for a, b in ((0, 1), (0, 2), (1, 2)))


def test_peft_changes_its_adapters(with_adapters, runs):
    """Disabled, of another scaling, and one more: nothing goes on with the LoRA that was there before."""
    model, *_ = with_adapters
    conversation = Conversation(model, 0)
    for _ in range(3):
        conversation.next()
    assert len(runs) == 3
    before = tokens(model)
    lora = next(module for module in model.modules() if isinstance(module, LoraLayer))
    [name] = lora.active_adapters
    with model.disable_adapter():
        disabled = tokens(model)
        assert rel(disabled, expected(model)) < ROUNDING and rel(disabled, before) > 0.02
    assert torch.equal(tokens(model), before)
    lora.scaling[name] *= 3
    assert rel(tokens(model), expected(model)) < ROUNDING and rel(tokens(model), before) > 1e-4
    lora.scaling[name] /= 3
    model.add_adapter("more", LoraConfig(r=3, target_modules=["o_proj"], init_lora_weights=False))
    model.base_model.set_adapter([name, "more"], inference_mode=True)
    more = tokens(model)
    assert rel(more, expected(model)) < ROUNDING and rel(more, before) > 0.02


def test_lora_is_changed_in_place(with_adapters):
    """Of attention, as PEFT's ``set_peft_model_state_dict`` does it; and of the experts alone, whose larger rank needs more memory."""
    model, *_ = with_adapters
    before = tokens(model)
    lora = next(module for module in model.modules() if isinstance(module, LoraLayer))
    with torch.no_grad():
        lora.lora_A[lora.active_adapters[0]].weight.mul_(-2)
    changed = tokens(model)
    assert rel(changed, expected(model)) < ROUNDING and rel(changed, before) > 1e-3


def test_experts_get_a_larger_rank(qwen, runs, monkeypatch):
    """``load_moe_lora_from_adapter`` exchanges the experts' LoRA alone, and a chain goes on."""
    engine = next(module.engine for module in qwen.modules() if isinstance(module, KTExperts))
    given, stock = [], chain.scratch
    monkeypatch.setattr(chain, "scratch", lambda nbytes: given.append(nbytes) or stock(nbytes))
    before, undo = tokens(qwen, batch=8), engine.set_lora(lora_for(engine.spec.shape, 5000, 0.1))
    try:
        given.clear(), runs.clear()
        found = tokens(qwen, batch=8)
        needed = kernels().kt_experts_scratch(
            byref(engine.call), 8, engine.spec.num_experts_per_tok, torch.get_num_threads()
        )
        assert len(runs) == 6 * 3 and min(given) >= needed
        assert rel(found, expected(qwen, batch=8)) < 2 * ROUNDING and rel(found, before) > 0.01
    finally:
        undo()


def test_peft_wraps_a_model(tmp_path, runs):
    """Layers get other modules, which the programs do not have."""
    model = made(tmp_path, "qwen3_moe")
    before = tokens(model)
    assert len(runs) == 4 * 3
    wrapped = PeftModel(model, LoraConfig(r=3, target_modules=["o_proj", "q_proj"], init_lora_weights=False)).eval()
    found = tokens(wrapped)
    assert rel(found, expected(wrapped)) < ROUNDING and rel(found, before) > 0.02


def test_weights_are_exchanged(tmp_path):
    """A parameter, its data, and a buffer; a weight's values in place."""
    model = made(tmp_path, "deepseek_v3")
    layer = model.model.layers[2]
    found = [tokens(model)]

    def changed() -> None:
        found.append(tokens(model))
        assert rel(found[-1], expected(model)) < ROUNDING and rel(found[-1], found[-2]) > 1e-3

    with torch.no_grad():
        layer.self_attn.o_proj.weight = nn.Parameter(layer.self_attn.o_proj.weight * 2, requires_grad=False)
        changed()
        optimize_for_inference(model)
        tokens(model)
        layer.self_attn.o_proj.weight.data = layer.self_attn.o_proj.weight * 0.2
        changed()
        optimize_for_inference(model)
        tokens(model)
        layer.self_attn.o_proj.weight.mul_(7)
        layer.post_attention_layernorm.weight.mul_(2)
        changed()
        layer.mlp.gate.e_score_correction_bias = layer.mlp.gate.e_score_correction_bias.flip(0) * 9
        changed()


def test_layers_change_their_dtype_and_back(tmp_path):
    """The programs' weights lay in memory that is gone."""
    model = made(tmp_path, "qwen3_moe", torch.bfloat16)
    tokens(model)
    for layer in model.model.layers:
        layer.float().bfloat16()
    filler = [torch.full((1024, 1024), 7.0) for _ in range(8)]
    found, wanted = tokens(model).flatten(0, 1), expected(model).flatten(0, 1)
    assert ((found - wanted).norm(dim=-1) / wanted.norm(dim=-1)).median() < 0.02 and filler


@pytest.mark.parametrize("where", ["a projection", "the layer", "all modules"])
def test_hooks_are_called(qwen, where):
    tokens(qwen)
    layer, calls = qwen.model.layers[1], []

    def hook(module, args, output):
        if module is place:
            calls.append(output)

    place = layer.self_attn.o_proj if where == "a projection" else layer
    if where == "all modules":
        handle = nn.modules.module.register_module_forward_hook(hook)
    else:
        handle = place.register_forward_hook(hook)
    try:
        found = tokens(qwen)
    finally:
        handle.remove()
    assert len(calls) == 7 and rel(found, expected(qwen)) < ROUNDING


def changed_in_place(module, args, output):
    output.mul_(1.5)


def changed(module, args, output):
    return output * 1.5


def changed_before(module, args):
    args[0].add_(0.1)


@pytest.mark.parametrize("hook", [changed_in_place, changed, changed_before])
def test_hooks_change_what_layers_pass_on(qwen, hook):
    """Some layers have been computed with what came before: what they put into the cache is taken back."""
    before = tokens(qwen)
    for watched in (False, True):  # by nobody but the code between layers; and by hooks that a layer knows of
        layer = qwen.model.layers[1]
        if watched or hook is changed:
            place = layer.register_forward_pre_hook if hook is changed_before else layer.register_forward_hook
            undo = place(hook).remove
        else:
            call = type(layer).__call__
            qwen.model.layers[1] = Around(layer, call, hook)
            undo = functools.partial(qwen.model.layers.__setitem__, 1, layer)
        try:
            found = tokens(qwen)
            wanted = expected(qwen)
        finally:
            undo()
        assert rel(found, wanted) < ROUNDING and rel(found, before) > 0.02
    assert rel(tokens(qwen), before) < ROUNDING


class Around(nn.Module):
    """Does something between two layers, of which they do not know."""

    def __init__(self, layer, call, hook):
        super().__init__()
        self.layer, self.hook, self.attention_type = layer, hook, getattr(layer, "attention_type", None)

    def forward(self, *args, **kwargs):
        if self.hook is changed_before:
            self.hook(self, args)
            return self.layer(*args, **kwargs)
        found = self.layer(*args, **kwargs)
        self.hook(self, args, found)
        return found


def test_a_call_that_stops_between_layers(qwen):
    """Layers that were not called have nothing in the cache, though the first one's call computed them; the conversation goes on."""
    conversations = []
    for context in (contextlib.nullcontext, lambda: untraced(qwen)):
        with context():
            tokens(qwen)
            conversation = Conversation(qwen, 0)
            conversation.next()
            count = qwen.config.num_hidden_layers
            for exits in (1, 2, 1):
                qwen.model.config.num_hidden_layers = exits
                conversation.next()
                qwen.model.config.num_hidden_layers = count
            conversation.next()
            conversations.append(conversation)
    one, other = (c.cache.layers for c in conversations)
    assert [layer.keys.shape[-2] for layer in one] == [layer.keys.shape[-2] for layer in other] == [17, 15, 14]
    assert all(
        rel(a.keys, b.keys) < ROUNDING and rel(a.values, b.values) < ROUNDING for a, b in zip(one, other, strict=True)
    )


def test_a_dropped_model_is_gone_at_once(tmp_path):
    model = made(tmp_path, "qwen3_moe")
    tokens(model)
    gone = [weakref.ref(model.model.layers[0].self_attn.q_proj.weight), weakref.ref(model.model.layers[1])]
    gc.disable()
    try:
        del model
        assert all(reference() is None for reference in gone)
    finally:
        gc.enable()


@pytest.mark.parametrize("more", [{"output_hidden_states": True}, {"output_router_logits": True}], ids=str)
def test_outputs_of_layers(tmp_path, more):
    """Asked for after layers have their programs, and then no longer."""
    model = made(tmp_path, "qwen3_moe")
    before = tokens(model)

    def last() -> list[torch.Tensor]:
        conversation = Conversation(model, 0)
        outs = [conversation.next(**more) for _ in range(4)]
        return [part for out in outs for part in getattr(out, next(iter(more)).removeprefix("output_"))]

    found = last()
    with untraced(model):
        wanted = last()
    assert len(found) == len(wanted) == 4 * (3 + ("output_hidden_states" in more))
    assert all(rel(one, other) < ROUNDING for one, other in zip(found, wanted, strict=True))
    assert rel(tokens(model), before) < ROUNDING


def test_gradients_are_on(qwen, runs):
    """Which experts say they do not have: no program computes without."""
    conversation = Conversation(qwen, 0)
    for _ in range(3):
        conversation.next()
    runs.clear()
    with pytest.raises(RuntimeError, match="KT experts are for inference"):
        qwen(input_ids=torch.tensor([[5]]), past_key_values=conversation.cache)
    assert not runs


def test_two_threads(qwen):
    """One of them records, or computes in one call; the other does so where it can. Both are right."""
    optimize_for_inference(qwen)  # nothing is recorded yet
    wanted = [expected(qwen, seed, 40) for seed in range(4)]
    found: list[torch.Tensor | None] = [None] * 4

    def chat(number: int) -> None:
        found[number] = tokens(qwen, number, 40)

    threads = [threading.Thread(target=chat, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(rel(one, other) < ROUNDING for one, other in zip(found, wanted, strict=True))


def test_routers_are_counted_once(tmp_path, runs):
    model = made(tmp_path, "qwen3_moe", router_stats=True)

    def counted(call) -> list[torch.Tensor]:
        reset_router_stats(model)
        call(model)
        return [torch.from_numpy(layer.counts) for layer in get_router_stats(model).values()]

    once, wanted, again = (torch.stack(counted(call)) for call in (tokens, expected, tokens))
    assert wanted.sum(-1).tolist() == [(12 + 6) * 3] * 3, "three experts of each token"
    assert torch.equal(once, wanted) and torch.equal(again, wanted)
    assert len(runs) == (4 + 6) * 3


def test_what_is_not_traced(tmp_path, monkeypatch):
    """Models that are debugged, engines whose calls a recording does not see, and no model at all without the internals."""
    assert not traced(made(tmp_path / "debug", "qwen3_moe", debug=True, debug_dir=str(tmp_path / "log")))
    assert not traced(made(tmp_path / "torch", "qwen3_moe", engine="torch"))
    monkeypatch.setenv("LLAMAFACTORY_KT_WITHOUT", "tracing")
    assert not traced(made(tmp_path / "without", "qwen3_moe"))


def test_other_caches(qwen, runs):
    """A static one, and none."""
    tokens(qwen)
    runs.clear()
    ids = torch.arange(30, 50)[None]
    for kind in ("static", None):
        keys = {"cache_implementation": kind} if kind else {"use_cache": False}
        found = [
            qwen.generate(ids, attention_mask=ids > 0, max_new_tokens=8, min_new_tokens=8, do_sample=False, **keys)
        ]
        with untraced(qwen):
            found.append(
                qwen.generate(ids, attention_mask=ids > 0, max_new_tokens=8, min_new_tokens=8, do_sample=False, **keys)
            )
        assert torch.equal(*found) and not runs, kind


@pytest.mark.parametrize(
    "keys", [{"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}, {"prompt_lookup_num_tokens": 3}, {"do_sample": True, "top_k": 9}], ids=str
)  # fmt: skip
def test_other_ways_to_generate(qwen, keys):
    ids = torch.arange(30, 50)[None]
    found = []
    for context in (contextlib.nullcontext, lambda: untraced(qwen)):
        with context():
            torch.manual_seed(0)
            keys = {"do_sample": False, **keys}
            found.append(qwen.generate(ids, attention_mask=ids > 0, max_new_tokens=16, min_new_tokens=16, **keys))
    assert torch.equal(*found)


def test_kinds_of_calls_are_bounded():
    """Each kind may keep what it recorded."""
    layer = Layer(lambda own, x, number: x * number).eval()
    layer.forward = TracedLayer(layer, layers.Shared())
    with torch.no_grad():
        for number in range(3 * MOST):
            x = torch.randn(1, 1, 8)
            assert torch.equal(layer(x, number=number), x * number)
    assert len(layer.forward.known) <= layers.KINDS


class Layer(nn.Module):
    """Stands for a decoder layer that does something unusual."""

    def __init__(self, compute):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 8, generator=torch.Generator().manual_seed(0)), requires_grad=False)
        self.compute = compute

    def forward(self, hidden_states, **more):
        return self.compute(self, hidden_states, **more)


def in_place(layer, x):
    y = x @ layer.weight.T
    y += x
    y[:, :, 2:4] *= 3
    return y.clamp_(-1, 1)


def of_a_value(layer, x):
    return x + 1 if x.sum() > 0 else x * 2


def of_an_item(layer, x):
    return x * x[0, 0, 0].item()


def of_a_list(layer, x):
    return x * (x[0, 0] > 0).nonzero().shape[0]


def of_chance(layer, x):
    return x + torch.rand(8)


def of_its_weight(layer, x):
    return x + (1 if layer.weight.sum().item() > -1e9 else 2)


def of_nothing(layer, x):
    return torch.full_like(x, 3.0)


def its_input(layer, x):
    return x


def wide(layer, x):
    return (x.double() @ layer.weight.double().T).float()


def shifted(layer, x):
    return torch.cat((x[..., 4:], x[..., :4].flip(-1)), -1).roll(1, -1).cumsum(-1)


def counts(layer, x):
    layer.count = getattr(layer, "count", 0) + 1
    return x * layer.count


@pytest.mark.parametrize(
    "compute",
    [
        in_place,
        of_a_value,
        of_an_item,
        of_a_list,
        of_chance,
        of_its_weight,
        of_nothing,
        its_input,
        wide,
        shifted,
        counts,
    ],
)
def test_layers_of_any_kind(compute):
    """They give what PyTorch gives, whatever a recording can know of them."""
    layer, other = Layer(compute).eval(), Layer(compute).eval()
    layer.forward = TracedLayer(layer, layers.Shared())
    random = torch.Generator().manual_seed(1)
    for number in range(12):
        x = torch.randn(1, 1, 8, generator=random) + (2 if number < 3 else -2)  # the first are all alike
        given = x.clone()
        with torch.inference_mode(number % 2 == 0), torch.no_grad():
            torch.manual_seed(number)
            found = layer(given)
            torch.manual_seed(number)
            wanted = other(x.clone())
        assert torch.allclose(found, wanted, rtol=1e-5, atol=1e-6), number
        if compute is not its_input:
            assert found.data_ptr() != given.data_ptr()


def test_a_number_that_follows_from_the_length_of_the_cache():
    """Also where the first two tokens that are recorded come after as many others, in two conversations."""
    layer = Layer(lambda own, x, past_key_values: x * past_key_values.get_seq_length()).eval()
    layer.forward = TracedLayer(layer, layers.Shared())
    with torch.no_grad():
        for held in (5, 5, 5, 7, 8):
            cache, x = DynamicCache(), torch.randn(1, 1, 8)
            cache.update(*(torch.zeros(1, 1, held, 2),) * 2, 0)
            assert torch.equal(layer(x, past_key_values=cache), x * held)


def test_results_stay(qwen):
    """What a layer has returned is not written over by the next token."""
    conversation = Conversation(qwen, 0)
    found = [conversation.next(output_hidden_states=True).hidden_states for _ in range(5)]
    copies = [[state.clone() for state in states] for states in found]
    conversation.next()
    assert all(
        torch.equal(a, b) for one, other in zip(found, copies, strict=True) for a, b in zip(one, other, strict=True)
    )


def test_a_cache_of_another_size_says_so(qwen):
    """As transformers' would, and the mask is never read beyond its end."""
    tokens(qwen)
    conversation = Conversation(qwen, 0, batch=2)
    with pytest.raises(RuntimeError), torch.inference_mode():
        qwen(input_ids=torch.tensor([[5]]), past_key_values=conversation.cache)


def test_recordings_of_two_threads_leave_no_mode_behind():
    """torch.compile, which asks PyTorch whether any thread is in such a mode, would compile nothing."""
    first, second = threading.Event(), threading.Event()

    def other():
        first.wait()
        with record():
            second.set()

    thread = threading.Thread(target=other)
    thread.start()
    with record():
        first.set()
        second.wait(0.2)
    thread.join()
    assert not _python_dispatch.is_in_torch_dispatch_mode()
