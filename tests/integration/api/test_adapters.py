"""Adapters to choose from, by ``model``: each answer is that of a chat with the one adapter alone."""

from __future__ import annotations

import asyncio
import shutil
from concurrent.futures import ThreadPoolExecutor

import openai
import pytest
import torch
from helpers.adapters import edit_adapter, make_adapter
from helpers.api import ask, client_of, serving_here
from helpers.chats import chat_model
from test_endpoints import figures

from llamafactory_kt import KTAdapterError, switch_adapter
from llamafactory_kt.integration.api.turns import MOST_OVERTAKING, AdapterTurns
from llamafactory_kt.integration.generation import Generation
from llamafactory_kt.model.state import kt_state

QUESTION = "Who are you, and what else do you know about it?"
ENGINE = {"kt_backend": "torch", "infer_dtype": "float32"}


@pytest.fixture(scope="module")
def adapters(model, tmp_path_factory):
    """Of two ranks, with LoRA on all modules and experts, and on fewer layers."""
    root = tmp_path_factory.mktemp("adapters")
    one = make_adapter(root / "one", model, rank=5, alpha=10)
    return {"one": one, "org/two": make_adapter(root / "two", model, rank=3, skip_layers=(1,), seed=2)}


@pytest.fixture(scope="module")
def alone(chat, model, adapters):
    """name -> the answer of a chat with that adapter alone."""
    one, two = adapters.values()
    paths = {"one": str(one), "org/two": str(two), "sum": f"{one},{two}"}
    found = {"My-Model": text(ask(client_of(chat), QUESTION, max_tokens=12))}
    for name, path in paths.items():
        found[name] = text(ask(client_of(chat_model(model, path, **ENGINE)), QUESTION, max_tokens=12))
    assert len({*found.values()}) == 4
    return found


@pytest.fixture(scope="module")
def chat_of_all(model, adapters):
    choices = {name: str(path) for name, path in adapters.items()} | {"sum": ",".join(map(str, adapters.values()))}
    return chat_model(model, kt_adapters=choices, **ENGINE)


@pytest.fixture
def client_of_all(chat_of_all):
    return client_of(chat_of_all)


def text(answer) -> str:
    return answer.choices[0].message.content


def test_they_are_listed(client_of_all):
    base, *others = client_of_all.models.list().data
    assert base.id == "My-Model" and [one.id for one in others] == ["one", "org/two", "sum"]
    assert {one.parent for one in others} == {"My-Model"}
    for name in ("org/two", "My-Model:org/two"):
        assert client_of_all.models.retrieve(name).id == "org/two"


def test_a_name_chooses(client_of_all, alone):
    for name, wanted in [*alone.items(), ("My-Model:one", alone["one"]), ("My-Model", alone["My-Model"])]:
        assert text(ask(client_of_all, QUESTION, model=name, max_tokens=12)) == wanted, name
        said = [""] * 2
        for chunk in ask(client_of_all, QUESTION, model=name, max_tokens=12, stream=True, n=2, temperature=0):
            assert chunk.model == name
            said[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
        assert said == [wanted] * 2, name
    prompt = {"prompt": "Hello, who", "max_tokens": 8}
    written = {
        name: client_of_all.completions.create(model=name, **prompt).choices[0].text for name in ("one", "org/two")
    }
    assert written["one"] != written["org/two"]
    assert client_of_all.completions.create(model="My-Model:one", **prompt).choices[0].text == written["one"]


@pytest.mark.parametrize(
    "name", ["gpt-3.5-turbo", "tow", "", "My-Model:", ":one", "My-Model:two", "two:one", "my-model", "One", "My-Model:My-Model", " one", "оne"]
)  # fmt: skip
def test_an_unknown_name(client_of_all, name):
    """It may be misspelt, and any answer would look like the right one."""
    asked = (
        lambda: ask(client_of_all, "x", model=name, max_tokens=1),
        lambda: ask(client_of_all, "x", model=name, max_tokens=1, stream=True),
        lambda: client_of_all.completions.create(model=name, prompt="x", max_tokens=1),
    )
    for each in asked:
        with pytest.raises(
            openai.NotFoundError, match="does not exist; this server has 'My-Model', 'one', 'org/two', 'sum'"
        ) as caught:
            each()
        assert (caught.value.code, caught.value.param) == ("model_not_found", "model")


def test_requests_for_all_of_them_at_once(chat_of_all, alone, monkeypatch):
    monkeypatch.setenv("MAX_CONCURRENT", "2")
    monkeypatch.setattr(chat_of_all.engine, "semaphore", asyncio.Semaphore(2))
    with serving_here(chat_of_all) as (host, port):
        client = openai.OpenAI(base_url=f"http://{host}:{port}/v1", api_key="none", max_retries=0)

        def answer(number: int) -> bool:
            name = [*alone][number * 7 % 4]
            if number % 3:
                return text(ask(client, QUESTION, model=name, max_tokens=12)) == alone[name]
            chunks = ask(client, QUESTION, model=name, max_tokens=12, stream=True)
            if number % 9 == 0:  # leaves in the middle
                next(chunks)
                chunks.close()
                return True
            return "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == alone[name]

        with ThreadPoolExecutor(12) as threads:
            assert all(threads.map(answer, range(24)))
        counted = figures(client, f"http://{host}:{port}")
    assert counted["adapter_switch_seconds_count",] >= 3
    assert all(counted["generated_tokens_total", name] > 0 for name in alone)
    assert counted["waiting_requests",] == counted["running_requests",] == 0


def test_nobody_is_overtaken_for_ever(chat_of_all):
    model, called = chat_of_all.engine.model, []
    switch_adapter(model, None)
    turns = AdapterTurns(model, lambda seconds: None)

    async def request(name, held=None):
        async with turns.turn(name, Generation()):
            called.append(name)
            if held is not None:
                await held.wait()
            await asyncio.sleep(0)

    async def main():
        held = asyncio.Event()
        running = [asyncio.create_task(request(None, held))]
        while not called:
            await asyncio.sleep(0)
        for name in ("one", *[None] * 9, "org/two", "one"):
            running.append(asyncio.create_task(request(name)))
            await asyncio.sleep(0)
        held.set()
        await asyncio.gather(*running)

    asyncio.run(main())
    assert called == [*[None] * (1 + MOST_OVERTAKING), "one", "one", *[None] * (9 - MOST_OVERTAKING), "org/two"]


def test_a_client_that_leaves_while_it_waits(chat_of_all):
    """No adapter is exchanged for it."""
    model, switches = chat_of_all.engine.model, []
    switch_adapter(model, None)
    turns = AdapterTurns(model, switches.append)

    async def request(name, generation):
        async with turns.turn(name, generation):
            pass

    async def main():
        stopped, cancelled = Generation(), Generation()
        async with turns.turn(None, Generation()):
            waiting = [asyncio.create_task(request("one", one)) for one in (stopped, cancelled)]
            await asyncio.sleep(0)
            stopped.stop()
            waiting[1].cancel()
            await asyncio.sleep(0)
        await waiting[0]
        await request(None, Generation())

    asyncio.run(main())
    assert not switches and not kt_state(model).adapters.adapters


def test_files_that_are_gone(model, adapters, alone, tmp_path):
    """All are in memory. One that has to be read again is an error of its requests alone."""
    paths = {name: shutil.copytree(path, tmp_path / name) for name, path in adapters.items()}
    chat = chat_model(model, kt_adapters={name: str(path) for name, path in paths.items()}, **ENGINE)
    client = client_of(chat)
    for path in paths.values():
        shutil.rmtree(path)
    for name in ("one", "My-Model", "org/two", "one"):
        assert text(ask(client, QUESTION, model=name, max_tokens=12)) == alone[name]
    kt_state(chat.engine.model).held.clear()
    for stream in (False, True):
        with pytest.raises(openai.APIError, match="the adapter's files have changed since it was opened, or are gone"):
            list(ask(client, QUESTION, model="org/two", max_tokens=12, stream=stream))
    for name in ("one", "My-Model", "one"):
        assert text(ask(client, QUESTION, model=name, max_tokens=12)) == alone[name]


def test_one_that_does_not_fit(model, adapters, tmp_path):
    """Before the weights are read; the error names it."""
    broken = edit_adapter(
        shutil.copytree(adapters["one"], tmp_path / "broken"),
        lambda tensors: {**tensors, "extra": torch.zeros(3)},
    )
    with pytest.raises(KTAdapterError, match=r"^kt_adapters: second: .*broken.*extra"):
        chat_model(
            model, adapters["one"], kt_adapters={"first": str(adapters["org/two"]), "second": str(broken)}, **ENGINE
        )


def test_beside_what_the_configuration_applies(model, adapters, alone):
    """The model's own name means that, as without kt_adapters; and the model alone has a name if it is given one."""
    keys = {"kt_adapters": {"plain": None, "org/two": str(adapters["org/two"])}, **ENGINE}
    client = client_of(chat_model(model, adapters["one"], **keys))
    for name, same in (("My-Model", "one"), ("plain", "My-Model"), ("org/two", "org/two"), ("My-Model", "one")):
        assert text(ask(client, QUESTION, model=name, max_tokens=12)) == alone[same]
