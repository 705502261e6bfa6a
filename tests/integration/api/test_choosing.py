"""Seeds, biases, penalties and probabilities of tokens, against plain arithmetic on the logits of the same model."""

from __future__ import annotations

import math
import threading
from collections import Counter

import pytest
import torch
from helpers.api import ask, client_of
from helpers.chats import chat_model
from transformers import AutoModelForCausalLM

QUESTION = "Who?"


@pytest.fixture(scope="module")
def logits(chat, model):
    """Stock transformers' float32 [V] of the token after the question and so many tokens of an answer."""
    engine, stock = chat.engine, AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    messages = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": ""}]
    prompt, _ = engine.template.encode_oneturn(engine.tokenizer, messages)

    def after(ids: list[int]) -> torch.Tensor:
        with torch.no_grad():
            return stock(input_ids=torch.tensor([[*prompt, *ids]])).logits[0, -1]

    return after


def greedy(chat, logits, count: int, change) -> str:
    """The answer when the logits are changed by change(logits, ids so far) before the likeliest token is taken."""
    ids: list[int] = []
    for _ in range(count):
        token = int(change(logits(ids).clone(), ids).argmax())
        if token == chat.engine.tokenizer.eos_token_id:
            break
        ids.append(token)
    return chat.engine.tokenizer.decode(ids, skip_special_tokens=True)


def text(answer) -> str:
    return answer.choices[0].message.content


def streamed(chunks) -> tuple[str, list]:
    """The text of a stream, and its tokens with their probabilities."""
    said, tokens = "", []
    for chunk in chunks:
        said += chunk.choices[0].delta.content or ""
        if chunk.choices[0].logprobs is not None:
            tokens += chunk.choices[0].logprobs.content
    return said, tokens


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("presence", "frequency"), [(2.0, 0.0), (0.0, 1.5), (-2.0, 0.0), (0.5, 0.7)])
def test_penalties(chat, client, logits, presence, frequency, stream):
    def change(scores, ids):
        for token, times in Counter(ids).items():
            scores[token] -= frequency * times + presence
        return scores

    answer = ask(client, QUESTION, max_tokens=12, presence_penalty=presence, frequency_penalty=frequency, stream=stream)
    assert (streamed(answer)[0] if stream else text(answer)) == greedy(chat, logits, 12, change)


def test_a_bias(chat, client, logits):
    first, second = logits([]).topk(2).indices.tolist()
    gap = float(logits([])[first] - logits([])[second])

    def change(scores, ids):
        scores[first] -= gap + 0.01
        return scores

    plain, biased = (
        text(ask(client, QUESTION, max_tokens=6, **keys)) for keys in ({}, {"logit_bias": {str(first): -gap - 0.01}})
    )
    assert biased == greedy(chat, logits, 6, change) != plain
    barely = text(ask(client, QUESTION, max_tokens=6, logit_bias={str(first): -gap + 0.01}))
    assert barely[:1] == plain[:1]


def test_a_penalty_for_presence_counts_once(chat, client, logits):
    """Two tokens by far the likeliest, so that both are said many times."""
    biases = dict.fromkeys(logits([]).topk(2).indices.tolist(), 50.0)

    def change(scores, ids):
        for token, bias in biases.items():
            scores[token] += bias
        for token in {*ids}:
            scores[token] -= 2.0
        return scores

    wanted = greedy(chat, logits, 16, change)
    keys = {"logit_bias": {str(token): bias for token, bias in biases.items()}, "presence_penalty": 2.0}
    assert text(ask(client, QUESTION, max_tokens=16, **keys)) == wanted


@pytest.mark.parametrize("stream", [False, True])
def test_probabilities_of_tokens(chat, client, logits, stream):
    """They are the model's own, whatever temperature and penalties make of them."""
    tokenizer = chat.engine.tokenizer
    keys = {"temperature": 1.7, "frequency_penalty": 1.0, "extra_body": {"do_sample": True}}
    answer = ask(client, QUESTION, max_tokens=8, seed=3, logprobs=True, top_logprobs=4, stream=stream, **keys)
    said, tokens = streamed(answer) if stream else (text(answer), answer.choices[0].logprobs.content)
    assert b"".join(bytes(token.bytes) for token in tokens).decode(errors="replace") == said
    ids: list[int] = []
    for token in tokens:
        wanted = logits(ids).log_softmax(-1)
        top = wanted.topk(4)
        assert [one.logprob for one in token.top_logprobs] == pytest.approx(top.values.tolist(), abs=1e-4)
        assert [one.token for one in token.top_logprobs] == [tokenizer.decode([one]) for one in top.indices.tolist()]
        (number,) = (
            number
            for number, logprob in enumerate(wanted.tolist())
            if abs(logprob - token.logprob) < 1e-4 and tokenizer.decode([number]) == token.token
        )
        ids.append(number)
    assert 1 < len(ids) <= 8


def test_a_stream_has_the_tokens_of_each_piece(client):
    """Those that begin in it; the last may go on in the next piece."""
    said, raw, last, pieces = "", b"", b"", 0
    for chunk in ask(client, QUESTION, max_tokens=30, logprobs=True, stream=True):
        (choice,) = chunk.choices
        said += choice.delta.content or ""
        for token in choice.logprobs.content if choice.logprobs else []:
            assert token.top_logprobs == []
            last = bytes(token.bytes)
            raw += last
        if choice.delta.content:
            pieces += 1
            assert raw.decode(errors="replace").startswith(said) and len(raw) - len(last) < len(said.encode())
    assert pieces > 3 and raw.decode(errors="replace") == said


def test_a_stop_string_cuts_the_tokens_too(client):
    whole = text(ask(client, QUESTION, max_tokens=30))
    stop = whole[len(whole) // 2 :][:3]
    for stream in (False, True):
        answer = ask(client, QUESTION, max_tokens=30, logprobs=True, stop=stop, stream=stream)
        said, tokens = streamed(answer) if stream else (text(answer), answer.choices[0].logprobs.content)
        raw = b"".join(bytes(token.bytes) for token in tokens).decode(errors="replace")
        assert said == whole[: whole.index(stop)] and raw.startswith(said) and stop not in raw[: len(said)]
        before = b"".join(bytes(token.bytes) for token in tokens[:-1]).decode(errors="replace")
        assert len(before) < len(said), "no token begins in the stop string"


def drawn(client, **keys) -> str:
    return text(ask(client, QUESTION, max_tokens=10, temperature=2.0, extra_body={"do_sample": True}, **keys))


def test_a_seed_gives_the_same_answer_again(client):
    one, other = drawn(client, seed=1), drawn(client, seed=2)
    assert one != other
    torch.manual_seed(5)
    drawn(client)  # moves the global generator
    assert drawn(client, seed=1) == one and drawn(client, seed=-(2**63)) == drawn(client, seed=-(2**63))
    assert len({drawn(client) for _ in range(3)}) > 1, "without a seed"
    said, _ = streamed(
        ask(client, QUESTION, max_tokens=10, temperature=2.0, seed=1, stream=True, extra_body={"do_sample": True})
    )
    assert said == one


def test_a_temperature_is_not_ignored(client):
    """The chat's YAML has do_sample: false."""
    likeliest = text(ask(client, QUESTION, max_tokens=10))
    assert likeliest == text(ask(client, QUESTION, max_tokens=10, temperature=0, top_p=0.9))
    assert likeliest == text(ask(client, QUESTION, max_tokens=10, temperature=2.0, extra_body={"do_sample": False}))
    for keys in ({"temperature": 2.0}, {"top_p": 1}):
        assert len({text(ask(client, QUESTION, max_tokens=10, seed=seed, **keys)) for seed in range(4)}) > 1


def test_seeds_of_several_answers(client):
    keys = {"max_tokens": 8, "temperature": 2.0, "n": 3, "seed": 7}
    whole = [choice.message.content for choice in ask(client, QUESTION, **keys).choices]
    assert len(set(whole)) == 3
    texts = ["", "", ""]
    for chunk in ask(client, QUESTION, stream=True, **keys):
        texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert texts == whole


def test_concurrent_requests_do_not_disturb_a_seed(chat, client, monkeypatch):
    import asyncio

    alone = {seed: drawn(client, seed=seed) for seed in range(4)}
    monkeypatch.setattr(chat.engine, "semaphore", asyncio.Semaphore(4))
    found: dict[int, str] = {}
    threads = [
        threading.Thread(target=lambda seed=seed: found.update({seed: drawn(client_of(chat), seed=seed)}))
        for seed in alone
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == alone


def test_draws_follow_the_models_distribution(client, chat, logits):
    """The first token of many answers, at a temperature and with ``top_k``, against the softmax of its logits."""
    scores = logits([]) / 1.5
    wanted = scores.where(scores >= scores.topk(5).values[-1], -torch.inf).softmax(-1)
    answers = [
        choice.logprobs.content
        for seed in range(4)
        for choice in ask(
            client,
            QUESTION,
            max_tokens=1,
            temperature=1.5,
            n=100,
            seed=seed,
            logprobs=True,
            extra_body={"top_k": 5, "do_sample": True},
            top_p=1,
        ).choices
    ]
    counts = Counter(tokens[0].token if tokens else "end" for tokens in answers)
    assert len(counts) <= 5
    expected = Counter()
    for token in wanted.nonzero()[:, 0].tolist():
        word = chat.engine.tokenizer.decode([token])
        expected["end" if token == chat.engine.tokenizer.eos_token_id else word] += 400 * float(wanted[token])
    for word, times in expected.items():
        assert abs(counts[word] - times) < 4 * math.sqrt(times) + 1, (counts, expected)


def test_with_beams_they_are_refused(demo):
    import openai

    client = client_of(chat_model(demo / "model", kt_backend="torch", num_beams=2))
    for keys in ({"seed": 1}, {"logprobs": True}, {"logit_bias": {"1": 1}}, {"presence_penalty": 1}):
        with pytest.raises(openai.BadRequestError, match="num_beams") as caught:
            ask(client, "x", max_tokens=2, **keys)
        assert caught.value.param in keys
    assert text(ask(client, "x", max_tokens=2))
