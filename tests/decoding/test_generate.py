"""Prompts that begin as earlier ones, against the same model that computes them as a whole. In float32 the logits are the same."""

from __future__ import annotations

import functools

import pytest
import torch
from helpers import architectures
from packaging.version import Version
from transformers import GenerationConfig, __version__

from llamafactory_kt import KTExpertsConfig, get_router_stats
from llamafactory_kt.decoding import generate as module
from llamafactory_kt.decoding.continuing import NEVER, ONE_BY_ONE, TOGETHER
from llamafactory_kt.decoding.generate import REWRITTEN, generate, keep_prompts
from llamafactory_kt.decoding.optimize import optimize_for_inference
from llamafactory_kt.engines.native import NativeEngine
from llamafactory_kt.model.state import kt_state

NEW = Version(__version__) >= Version("5.24")
KINDS = {
    "qwen3_moe": TOGETHER,
    "deepseek_v2": TOGETHER,  # latents
    "gpt_oss": TOGETHER,  # a window in every other layer, sinks
    "mixtral": TOGETHER,  # windows alone
    "gemma4_text": TOGETHER,
    "llama4_text": TOGETHER,
    "qwen3_next": TOGETHER if NEW else ONE_BY_ONE,
    "lfm2_moe": TOGETHER if NEW else ONE_BY_ONE,
    "jamba": ONE_BY_ONE,
    "glm_moe_dsa": NEVER,  # chooses the tokens that it sees, by keys that older versions keep in no cache
}
FORGETTING = {"gpt_oss", "mixtral", "qwen3_next", "lfm2_moe", "jamba", *(["gemma4_text"] if NEW else [])}


class Reading:
    """Notes what it is told, and stops after so many tokens."""

    def __init__(self, stop_at: int = 10**9):
        self.cached_tokens, self.told, self.stop_at = 0, [], stop_at

    def read(self, tokens: int) -> bool:
        self.told.append(tokens)
        return tokens < self.stop_at


def load(directory, name="qwen3_moe", **keys):
    made = architectures.tiny_model(name)
    made.save_pretrained(directory)
    backend = "native" if NativeEngine.problem() is None else "torch"  # with its recorded layers
    model = type(made).from_pretrained(
        directory, dtype=torch.float32, quantization_config=KTExpertsConfig(backend=backend, **keys)
    )
    optimize_for_inference(model)
    keep_prompts(kt_state(model), gib=1)
    return model


def ask(model, ids, tokens=6, kept=True, reading=None, **keys):
    """(all ids, logits of the answer [tokens, V], the reading)"""
    config = GenerationConfig(
        max_new_tokens=tokens, do_sample=False, return_dict_in_generate=True, output_logits=True, pad_token_id=1, **keys
    )
    config.eos_token_id = None
    reading = reading or Reading()
    custom = {"custom_generate": functools.partial(generate, reading=reading)} if kept else {}
    mask = torch.ones(1, len(ids), dtype=torch.long)
    found = model.generate(inputs=torch.tensor([ids]), attention_mask=mask, generation_config=config, **custom)
    if isinstance(found, torch.Tensor):  # reading was stopped
        return found[0].tolist(), None, reading
    return found.sequences[0].tolist(), torch.stack(found.logits)[:, 0], reading


def exact(model, ids, **keys) -> int:
    """Ask with and without what is kept; returns the tokens that were reused."""
    found, logits, reading = ask(model, ids, **keys)
    wanted, whole, _ = ask(model, ids, kept=False)
    assert found == wanted
    assert ((logits - whole).norm(dim=-1) / whole.norm(dim=-1)).median() < 1e-5
    return reading.cached_tokens


@pytest.fixture
def tokens():
    generator = torch.Generator().manual_seed(1)
    return lambda count: torch.randint(2, 1000, (count,), generator=generator).tolist()


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch, cache):
    monkeypatch.setattr(module, "CHUNK", 24)


@pytest.mark.parametrize("name", KINDS)
def test_turns_edits_branches(tmp_path, tokens, name):
    model = load(tmp_path, name)
    first = tokens(60)
    history, _, reading = ask(model, first)
    assert reading.cached_tokens == 0 and reading.told == sorted(reading.told)
    turn = [*history, *tokens(40)]
    way, never = KINDS[name], KINDS[name] != TOGETHER
    assert exact(model, turn) == (0 if never else 65), "all but the last token, of which nobody asked for the next"
    assert kt_state(model).continues in (way, None)
    forgets = name in FORGETTING
    edited = exact(model, [*turn[:70], *tokens(30)])
    assert edited == (0 if never else 60 - REWRITTEN if forgets else 70)
    assert exact(model, [*first, *tokens(30)]) == (0 if never else 60 - REWRITTEN if forgets else 60), "another branch"
    assert exact(model, [*turn[:-10], *tokens(20)]) == (0 if never else len(turn) - (REWRITTEN if forgets else 10))
    assert exact(model, turn) == (0 if never else len(turn) - (REWRITTEN if forgets else 10)), "once more"
    if way == ONE_BY_ONE:
        more = [*ask(model, turn)[0], *tokens(3)]
        assert exact(model, more) == len(more) - 4, "a few tokens, one after the other"
    assert (kt_state(model).prompts.sequences == 0) == (way == NEVER)


def test_several_answers_share_the_prompt(tmp_path, tokens):
    model = load(tmp_path)
    prompt = tokens(60)
    config = GenerationConfig(max_new_tokens=5, do_sample=True, top_k=1, num_return_sequences=3, pad_token_id=1)
    custom = functools.partial(generate, reading=(reading := Reading()))
    three = model.generate(torch.tensor([prompt]), generation_config=config, custom_generate=custom)
    wanted = ask(model, prompt, tokens=5, kept=False)[0]
    assert three.tolist() == [wanted] * 3 and reading.told[-1] == 59
    assert exact(model, [*prompt, *tokens(9)]) == 59
    one = torch.tensor([prompt[:1]])
    several = model.generate(
        one, generation_config=config, custom_generate=functools.partial(generate, reading=Reading())
    )
    assert several.tolist() == [ask(model, prompt[:1], tokens=5, kept=False)[0]] * 3, "of one token nothing is shared"


def test_stopped_and_failing_prompts(tmp_path, tokens):
    """What was computed for all layers is kept; what broke off in the middle of them is not."""
    model, prompt = load(tmp_path), tokens(100)
    found, logits, _ = ask(model, prompt, reading=Reading(stop_at=40))
    assert found == prompt and logits is None
    assert exact(model, prompt) == 48, "the last layer's experts were not computed, but all keys and values were"
    found, logits, reading = ask(model, [*prompt[:50], *tokens(50)], reading=Reading(stop_at=60))
    assert logits is None and reading.told == [50, 58, 66] and exact(model, found) == 74
    prompt = tokens(100)
    layer = model.model.layers[1]
    calls = []

    def fail(*args, **kwargs):
        calls.append(args)
        if len(calls) == 2:
            raise RuntimeError("no")

    handle = layer.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="no"):
        ask(model, prompt)
    handle.remove()
    assert exact(model, prompt) == 24


@pytest.mark.parametrize("name", ["qwen3_next", "gpt_oss"])
def test_stopped_where_layers_cannot_go_back(tmp_path, tokens, name):
    """States of linear attention and windows, which have begun with a part of the prompt, are not taken for those before it."""
    model = load(tmp_path, name)
    history = ask(model, tokens(120))[0]
    new, stops = (4, (1, 2)) if KINDS[name] == ONE_BY_ONE else (60, (10, 30))
    for stop in stops:
        more = [*history, *tokens(new)]
        found, logits, reading = ask(model, more, reading=Reading(stop_at=len(history) + stop))
        assert found == more and logits is None and reading.told[-1] >= len(history) + stop
        exact(model, more)
    fail = model.model.layers[-1].register_forward_pre_hook(lambda *_: 1 / 0)
    more = [*history, *tokens(4)]
    with pytest.raises(ZeroDivisionError):
        ask(model, more)
    fail.remove()
    exact(model, more)


def test_either_mode_of_torch(tmp_path, tokens):
    """LLaMA-Factory generates whole answers in inference mode, and streams without: what one keeps, the other goes on with."""
    model = load(tmp_path, "gpt_oss")
    with torch.inference_mode():
        history, _, _ = ask(model, tokens(60))
    history, _, reading = ask(model, [*history, *tokens(9)])
    assert reading.cached_tokens == 65
    with torch.inference_mode():
        assert exact(model, [*history, *tokens(9)]) == len(history) - 1


def test_every_token_is_counted_once(tmp_path, tokens):
    model = load(tmp_path, router_stats=True)
    prompt = tokens(60)
    history, _, _ = ask(model, prompt)
    kt_state(model).continues = None  # as in a new process: asking the model is no conversation
    turn = [*history, *tokens(31)]
    answer, _, _ = ask(model, turn)
    found = next(iter(get_router_stats(model).values()))
    assert found.tokens == len(answer) - 1 and found.prompt_tokens == 60 + 1 + 31, (
        "the last token of an answer is of the next prompt"
    )


def test_another_adapter_is_something_else(tmp_path, tokens):
    model = load(tmp_path)
    history, _, _ = ask(model, tokens(60))
    state = kt_state(model)
    key = type(state).weights_key
    try:
        type(state).weights_key = property(lambda _: "other")
        assert exact(model, history) == 0
    finally:
        type(state).weights_key = key
    assert exact(model, history) == 64
