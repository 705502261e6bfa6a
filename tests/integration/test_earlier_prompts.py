"""Conversations whose beginnings are kept, through LLaMA-Factory's ChatModel."""

from __future__ import annotations

import random
from concurrent.futures import ThreadPoolExecutor

import pytest
from helpers.adapters import make_adapter
from helpers.chats import CONVERSATIONS, EXPECTED, PROMPTS, chat_model
from helpers.marks import KERNEL_PROBLEM
from helpers.models import make_model

from llamafactory_kt import switch_adapter
from llamafactory_kt.integration.generation import Generation
from llamafactory_kt.integration.terminal import chat_model as terminal
from llamafactory_kt.model.state import kt_state

ENGINE = "torch" if KERNEL_PROBLEM else "AMXBF16"


@pytest.fixture(scope="module")
def chat(demo):
    return chat_model(demo / "model", demo / "adapter", kt_backend=ENGINE)


def ask(chat, messages, **keys):
    """(the answer, its Generation)"""
    generation = Generation()
    texts = chat.stream_chat([dict(message) for message in messages], kt_generation=generation, **keys)
    return "".join(texts), generation


def alone(chat, messages, **keys) -> str:
    """The answer where nothing is kept."""
    state = kt_state(chat.engine.model)
    kept, state.prompts = state.prompts, None
    try:
        found, generation = ask(chat, messages, **keys)
    finally:
        state.prompts = kept
    assert generation.cached_tokens == 0
    return found


def said(question: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


@pytest.mark.parametrize("questions", [12, pytest.param(250, marks=pytest.mark.nightly)])
def test_conversations_answer_as_without(chat, questions):
    """Questions of the demo, one after the other, in four conversations: prompts in bf16 round otherwise in parts, so a tie may fall to
    the other side."""
    choose, equal, asked, reused, read = random.Random(2), 0, 0, 0, 0
    conversations = [[], [], [], []]
    for item in choose.choices(CONVERSATIONS, k=questions):
        messages = choose.choice(conversations)
        if len(messages) > 8:
            del messages[4:]  # and on with another branch
        question = {"role": "user", "content": item["prompt"]}
        found, generation = ask(chat, [*messages, question], max_new_tokens=24)
        equal += found == alone(chat, [*messages, question], max_new_tokens=24)
        asked, reused, read = asked + 1, reused + generation.cached_tokens, read + generation.prompt_tokens
        messages += said(item["prompt"], found)
    print(f"{equal} of {asked} answers are equal; {reused} of {read} tokens were kept")
    assert equal >= 0.9 * asked
    assert reused > read / 2


def test_first_questions_are_answered_as_trained(chat):
    for prompt in PROMPTS * 2:
        assert ask(chat, [{"role": "user", "content": prompt}])[0] == EXPECTED[prompt]["adapter"]


def test_an_adapter_switched_in_between(chat, demo):
    model, history = chat.engine.model, said(PROMPTS[2], "I am a cat.")
    question = [*history, {"role": "user", "content": PROMPTS[3]}]
    first, _ = ask(chat, question)
    try:
        switch_adapter(model, None)
        base, generation = ask(chat, question)
        assert generation.cached_tokens == 0 and base == alone(chat, question) != first
    finally:
        switch_adapter(model, demo / "adapter")
    again, generation = ask(chat, question)
    assert generation.cached_tokens == generation.prompt_tokens - 2 and again == first, "they are still there"


def test_whole_answers_and_system_prompts(chat):
    system = "You are a cat. " * 10
    first = chat.chat([{"role": "user", "content": "Who are you?"}], system=system, max_new_tokens=8)[0]
    messages = [{"role": "user", "content": "And who am I?"}]
    found, generation = ask(chat, messages, system=system, max_new_tokens=8)
    assert generation.cached_tokens > 30 and found == alone(chat, messages, system=system, max_new_tokens=8)
    several = chat.chat(
        [{"role": "user", "content": "Who are you?"}], system=system, max_new_tokens=8, num_return_sequences=3, top_k=1
    )
    assert {response.response_text for response in several} == {first.response_text}


def test_a_stopped_prompt_goes_on_next_time(chat):
    messages = [{"role": "user", "content": "word " * 1500}]
    generation = Generation()
    generation.watch = lambda reading: reading.stop() if reading.read_tokens >= 600 else None
    assert "".join(chat.stream_chat(messages, kt_generation=generation, max_new_tokens=4)) == ""
    assert (generation.tokens, generation.finish_reason) == (0, "stop")
    assert 600 <= generation.read_tokens < generation.prompt_tokens
    found, later = ask(chat, messages, max_new_tokens=4)
    assert later.cached_tokens >= 512 and found


def test_eight_at_once_with_one_beginning(tmp_path, monkeypatch):
    """Each gets what it gets alone, in float32 to the last token."""
    monkeypatch.setenv("MAX_CONCURRENT", "8")
    model = make_model(tmp_path / "model", "qwen3_moe", max_position_embeddings=4096)
    adapter = make_adapter(tmp_path / "adapter", model)
    chat = chat_model(model, adapter, kt_backend="torch", infer_dtype="float32", max_new_tokens=8)
    system = "A long beginning of everything. " * 8
    prompts = [[{"role": "user", "content": f"{number}. What is this?"}] for number in range(8)]
    wanted = [alone(chat, prompt, system=system) for prompt in prompts]
    with ThreadPoolExecutor(8) as clients:
        for _ in range(3):
            found = list(clients.map(lambda prompt: ask(chat, prompt, system=system), prompts))
            assert [text for text, _ in found] == wanted
    assert all(generation.cached_tokens > 60 for _, generation in found)


def test_switched_off_and_bounded(demo):
    chat = chat_model(demo / "model", kt_backend="torch", kt_prompt_cache=False)
    messages = [{"role": "user", "content": PROMPTS[2]}]
    for _ in range(2):
        assert ask(chat, messages, max_new_tokens=3)[1].cached_tokens == 0
    chat = chat_model(demo / "model", kt_backend="torch", kt_prompt_cache_gib=1e-5)
    for _ in range(2):
        assert ask(chat, messages, max_new_tokens=3)[1].cached_tokens == 0
    assert kt_state(chat.engine.model).prompts.nbytes == 0


def test_progress_in_the_terminal(monkeypatch, capsys):
    monkeypatch.setattr(terminal, "_SECONDS", 0)
    generation = Generation()
    generation.prompt_tokens = 1200
    progress = terminal._Progress(generation)
    for tokens in (0, 512, 1024):
        generation.read(tokens)
    progress.end()
    progress.end()
    generation.read(1200)
    out = capsys.readouterr().out
    shown, place = [" "] * 80, 0
    for character in out:  # as a terminal does
        if character == "\b":
            place -= 1
        else:
            shown[place], place = character, place + 1
    assert "reading the prompt 512 of 1200" in out and "".join(shown).strip() == "" and place == 0
