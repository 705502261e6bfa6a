"""What else a server answers: texts without a template, the model's name, its health, and figures for Prometheus."""

from __future__ import annotations

import openai
import pytest
from helpers.api import ask, client_of
from prometheus_client.parser import text_string_to_metric_families
from test_errors import broken
from transformers import AutoModelForCausalLM, AutoTokenizer


@pytest.fixture(scope="module")
def written(model):
    """Stock transformers: (the text that it goes on with, the tokens' logarithms) for a prompt."""
    tokenizer, stock = AutoTokenizer.from_pretrained(model), AutoModelForCausalLM.from_pretrained(model).eval()

    def go_on(prompt: str, count: int) -> tuple[str, list[float]]:
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        found = stock.generate(
            ids, max_new_tokens=count, do_sample=False, output_logits=True, return_dict_in_generate=True
        )
        new = found.sequences[0, ids.shape[1] :]
        logprobs = [float(logits.log_softmax(-1)[0, token]) for logits, token in zip(found.logits, new, strict=True)]
        return tokenizer.decode(new, skip_special_tokens=True), logprobs

    return go_on


@pytest.mark.parametrize("prompt", ["Hello, who", "<|im_start|>user\n你好"])
def test_a_text_goes_on(client, written, prompt):
    text, logprobs = written(prompt, 9)
    keys = {"model": "any", "prompt": prompt, "max_tokens": 9, "temperature": 0}
    answer = client.completions.create(**keys, logprobs=2)
    (choice,) = answer.choices
    assert choice.text == text and answer.object == "text_completion" and choice.finish_reason == "length"
    assert choice.logprobs.token_logprobs == pytest.approx(logprobs, abs=1e-4)
    offsets = choice.logprobs.text_offset
    assert offsets[0] == 0 < offsets[-1] and offsets == sorted(offsets)
    for offset, token in zip(offsets, choice.logprobs.tokens, strict=True):
        # a part of a character has no text of its own, and may stand before a token's
        assert "\ufffd" in token or token in text[offset : offset + 1 + len(token)]
    assert all(len(top) <= 2 for top in choice.logprobs.top_logprobs)
    assert answer.usage.completion_tokens == 9
    chunks = list(client.completions.create(**keys, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].text for chunk in chunks[:-1]) == text
    assert chunks[-2].choices[0].finish_reason == "length" and chunks[-1].usage.completion_tokens == 9
    for given in ([prompt], "x"):  # of one token, too
        answers = client.completions.create(**{**keys, "prompt": given, "n": 2, "seed": 1, "temperature": 0}).choices
        assert [answer.index for answer in answers] == [0, 1] and answers[0].text == answers[1].text


@pytest.mark.parametrize(
    "keys",
    [{"echo": True}, {"suffix": "x"}, {"best_of": 2}, {"best_of": 1, "n": 2}, {"prompt": ["a", "b"]}, {"prompt": [1, 2]}, {"prompt": ""}, {"logprobs": 6},
     {"max_tokens": 10**9}, {"messages": []}, {"prompt": "word " * 3000}],
)  # fmt: skip
def test_texts_that_are_refused(client, keys):
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(**{"model": "any", "prompt": "x", "max_tokens": 1, "extra_body": keys})
    assert caught.value.param.partition("[")[0] in keys


def test_defaults_of_fields_that_are_refused(client):
    """As clients send them."""
    keys = {"model": "any", "prompt": "x", "max_tokens": 4, "temperature": 0}
    (plain,) = client.completions.create(**keys).choices
    for same in ({"best_of": 1}, {"best_of": 2, "n": 2}, {"echo": False}, {"suffix": ""}):
        assert client.completions.create(**keys, **same).choices[0].text == plain.text


def test_the_models_name(chat, client, monkeypatch):
    (entry,) = client.models.list().data
    assert (entry.id, entry.object) == ("My-Model", "model") and client.models.retrieve("My-Model") == entry
    with pytest.raises(openai.NotFoundError, match="does not exist; this server has 'My-Model'") as caught:
        client.models.retrieve("a/b")
    assert caught.value.code == "model_not_found"
    with pytest.raises(openai.NotFoundError, match="'My-Model:one' does not exist"):  # whatever other names mean here
        ask(client, "x", model="My-Model:one")
    monkeypatch.setenv("API_MODEL_NAME", "org/name")
    assert client_of(chat).models.retrieve("org/name").id == "org/name"


def test_health_and_keys(chat, monkeypatch):
    monkeypatch.setenv("API_KEY", "secret")
    http = client_of(chat)._client
    assert http.get("/health").json() == {"status": "ok"}
    for path in ("/metrics", "/v1/models"):
        assert http.get(path).status_code == 401
        assert http.get(path, headers={"Authorization": "Bearer secret"}).status_code == 200
    assert http.post("/v1/completions", json={"model": "any", "prompt": "x"}).status_code == 401


def figures(client, address: str = "") -> dict[tuple, float]:
    families = text_string_to_metric_families(client._client.get(f"{address}/metrics").text)
    return {
        (sample.name.removeprefix("llamafactory_kt_"), *sample.labels.values()): sample.value
        for family in families
        for sample in family.samples
    }


def test_figures_for_prometheus(client):
    used = [ask(client, "Who is it? " * 20, max_tokens=5, n=n).usage for n in (1, 2)]
    chunks = list(ask(client, "Who is it? " * 20, max_tokens=5, stream=True, stream_options={"include_usage": True}))
    used.append(chunks[-1].usage)
    with pytest.raises(openai.BadRequestError):
        ask(client, "x", temperature=-1)
    client._client.post("/v1/nothing")
    found = figures(client)
    assert found["requests_total", "/v1/chat/completions", "200"] == 3
    assert found["requests_total", "/v1/chat/completions", "400"] == found["requests_total", "other", "404"] == 1
    assert found["prompt_tokens_total", "My-Model"] == sum(one.prompt_tokens for one in used) > 0
    assert found["generated_tokens_total", "My-Model"] == sum(one.completion_tokens for one in used) > 0
    assert (
        found["cached_prompt_tokens_total", "My-Model"]
        == sum(one.prompt_tokens_details.cached_tokens for one in used)
        > 0
    )
    assert found["first_token_seconds_count",] == 3 and found["request_seconds_count",] == 5
    assert 0 < found["first_token_seconds_sum",] < found["request_seconds_sum",]
    assert found["waiting_requests",] == found["running_requests",] == 0
    assert found["prompt_cache_bytes",] > 0 and found["prompt_cache_sequences",] > 0
    assert found["process_resident_memory_bytes",] > 10**8


def test_requests_that_wait_are_counted(chat, client):
    import asyncio
    import threading
    import time

    async def hold():
        async with chat.engine.semaphore:
            while not done.is_set():
                await asyncio.sleep(0.01)

    done = threading.Event()
    holder = threading.Thread(target=lambda: asyncio.run(hold()))
    asker = threading.Thread(target=lambda: ask(client, "x", max_tokens=1))
    holder.start()
    asker.start()
    for _ in range(500):
        if (found := figures(client))["waiting_requests",] == 1:
            break
        time.sleep(0.02)
    done.set()
    holder.join()
    assert found["waiting_requests",] == 1 and found["running_requests",] == 0
    asker.join(30)


def test_without_prometheus_client(monkeypatch):
    from llamafactory_kt.integration.api import metrics

    monkeypatch.setattr(metrics, "find_spec", lambda name: None)
    answer = client_of(broken())._client.get("/metrics")
    assert answer.status_code == 501 and "pip install prometheus-client" in answer.json()["error"]["message"]
