"""The methods behind LlamaBoard's Chat tab, without a browser."""

from __future__ import annotations

import inspect
import time
import weakref
from collections.abc import Iterator
from pathlib import Path
from threading import Event
from typing import Any

import gradio
import pytest
from helpers.chats import EXPECTED, PROMPTS
from helpers.children import child
from helpers.image_text import make_image_text_model
from helpers.pages import FIGURES
from llamafactory.webui.chatter import WebChatModel

from llamafactory_kt.engines.reference import ReferenceEngine
from llamafactory_kt.integration.generation import Generation
from llamafactory_kt.integration.webui.page_answer import PageAnswer
from llamafactory_kt.load_report import load_rows
from llamafactory_kt.router_stats.stats import get_router_stats

HAS_SEED = "seed" in inspect.signature(WebChatModel.stream).parameters
"""LLaMA-Factory 0.9.6"""


class Board:
    """LlamaBoard's Chat tab without a browser."""

    def __init__(self, demo: Path):
        from llamafactory.webui.components import create_infer_tab, create_top
        from llamafactory.webui.engine import Engine

        with gradio.Blocks() as self.page:
            self.engine = Engine()
            self.manager = self.engine.manager
            self.manager.add_elems("top", create_top())
            self.manager.add_elems("infer", create_infer_tab(self.engine))
        self.chatter = self.engine.chatter
        self.data = {element: getattr(element, "value", None) for element in self.manager.get_elem_list()}
        self.set("top", lang="en", model_name="Custom", model_path=str(demo / "model"), template="deepseek")
        self.set("infer", use_kt=True, kt_backend="torch", extra_args='{"do_sample": false}')

    def set(self, tab: str, **values: Any) -> None:
        self.data |= {self.manager.get_elem_by_id(f"{tab}.{name}"): value for name, value in values.items()}

    def load(self) -> str:
        return list(self.chatter.load_model(self.data))[-1]

    def unload(self) -> str:
        return list(self.chatter.unload_model(self.data))[-1]

    def ask(self, prompt: str, **changes: Any) -> Any:
        asked = {"max_new_tokens": 1024, "top_p": 0.7, "temperature": 0.95, "skip_special_tokens": True, **changes}
        asked |= {"escape_html": True, "enable_thinking": True}
        if HAS_SEED:
            asked.setdefault("seed", -1)
        messages = asked.pop("messages", [{"role": "user", "content": prompt}])
        return self.chatter.stream([], messages, "en", "", "", None, None, None, **asked)


@pytest.fixture
def tab(tmp_path, demo, monkeypatch) -> Iterator[Board]:
    monkeypatch.chdir(tmp_path)  # LlamaBoard writes its settings there
    board = Board(demo)
    yield board
    board.unload()


@pytest.fixture
def slowly(monkeypatch) -> None:
    """Each answer takes about a second."""
    forward = ReferenceEngine.forward

    def slowed(*args: Any) -> Any:
        time.sleep(0.015)
        return forward(*args)

    monkeypatch.setattr(ReferenceEngine, "forward", slowed)


def test_fields_for_pictures(tab, tmp_path):
    """LLaMA-Factory shows them for names of its list, and for no model that is given by its path."""
    box = tab.manager.get_elem_by_id("infer.mm_box")
    refresh = next(each for each in tab.page.fns.values() if getattr(each.fn, "__name__", "") == "refresh")
    assert box in refresh.outputs

    def shown() -> bool:
        update = refresh.fn("en", "loaded")[refresh.outputs.index(box)]
        return isinstance(update, gradio.Column) and update.visible

    tab.load()
    assert not shown()
    tab.unload()
    model = make_image_text_model(tmp_path / "model", "qwen3_vl_moe")
    tab.set("top", model_path=str(model), template="qwen3_vl_nothink")
    tab.load()
    assert shown()


def test_section_and_extra_arguments(tab):
    from llamafactory_kt.integration.webui.chatter import with_section

    def keys(extra: dict) -> dict:
        return with_section(tab.manager, tab.data, extra)

    assert keys({}) == {"use_kt": True, "kt_backend": "torch"}, "what is as by default is left out"
    tab.set("infer", kt_num_threads=" 8 ", kt_threadpool_count=2, kt_weight_path=" ", kt_lora_scope="attention")
    section = {"use_kt": True, "kt_backend": "torch", "kt_num_threads": "8", "kt_threadpool_count": 2, "kt_lora_scope": "attention"}  # fmt: skip
    assert keys({}) == section
    assert keys({"kt_backend": "auto", "kt_debug": True}) == section | {"kt_backend": "auto", "kt_debug": True}
    nested = {"kt_config": {"kt_num_threads": 4}}
    assert keys(nested) == {k: v for k, v in section.items() if k != "kt_num_threads"} | nested
    tab.set("infer", use_kt=False)
    assert keys({"kt_num_threads": 4}) == {"kt_num_threads": 4}


def test_unloading_ends_answers_and_leaves_nothing(tab, slowly):
    whole = EXPECTED[PROMPTS[2]]["base"]
    for _ in range(2):
        assert tab.load().startswith("Model loaded")
        model, thread = weakref.ref(tab.chatter.engine.model), tab.chatter._thread
        answer = tab.ask(PROMPTS[2])
        next(answer)
        assert tab.unload() == "Model unloaded." and model() is None and not thread.is_alive()
        *_, (_, messages) = answer  # it ends, and the reader does not wait for ever
        said = "".join(message["content"] for message in messages if message["role"] == "assistant")
        assert whole.startswith(said) and len(said) < len(whole)
        with pytest.raises(gradio.Error, match="was unloaded"):
            list(tab.ask(PROMPTS[2]))
        assert tab.load().startswith("Model loaded")
        model = weakref.ref(tab.chatter.engine.model)
        *_, (shown, messages) = tab.ask(PROMPTS[2])
        assert FIGURES["en"].search(shown[-1]["content"])
        assert messages[-1] == {"role": "assistant", "content": whole}
        tab.unload()
        assert model() is None


def test_a_question_without_an_answer_is_not_sent_again(tab):
    tab.load()
    asked = [{"role": "user", "content": text} for text in ("stopped before any word", PROMPTS[2])]
    *_, (_, messages) = tab.ask(PROMPTS[2], messages=asked)
    assert messages[-1] == {"role": "assistant", "content": EXPECTED[PROMPTS[2]]["base"]} and len(messages) == 2


def test_nor_is_one_that_was_stopped_while_it_was_read(tab, slowly):
    from llamafactory_kt.integration.webui.answers import answers_of

    tab.load()
    for _, messages in tab.ask("word " * 1500, kt_page="page"):
        left = messages
        answer = answers_of(tab.chatter).last("page")
        if answer.generation.read_tokens:
            answer.stop()
    assert answer.stopped and answer.generation.tokens == 0
    asked = [*left, {"role": "user", "content": PROMPTS[2]}]
    *_, (_, messages) = tab.ask(PROMPTS[2], messages=asked)
    assert messages[-1] == {"role": "assistant", "content": EXPECTED[PROMPTS[2]]["base"]} and len(messages) == 2


def test_answers_of_pages(tab, slowly):
    """A page finds the answer of its browser again, and one that no page shows makes room for the next."""
    from llamafactory_kt.integration.webui.answers import answers_of

    tab.load()
    answers = answers_of(tab.chatter)
    assert answers.opened("page", "browser") is None and answers.opened("other page", "other browser") is None
    asking = tab.ask(PROMPTS[2], kt_page="page")
    next(asking)
    left = answers.last("page")
    assert answers.opened("page after a reload", "browser") is left and answers.last("other page") is None
    asking.close()
    *_, (shown, _) = left.follow("en")
    assert shown[-2]["content"] == EXPECTED[PROMPTS[2]]["base"]

    asking = tab.ask(PROMPTS[2], kt_page="page")
    next(asking)
    asking.close()
    left = answers.last("page")
    *_, (shown, _) = tab.ask(PROMPTS[2], kt_page="other page")
    assert left.stopped and shown[-2]["content"] == EXPECTED[PROMPTS[2]]["base"]

    asking = tab.ask(PROMPTS[2], kt_page="page")
    next(asking)
    answers.clear("page")
    assert [*asking][-1] == ([], []) and answers.last("page") is None


def test_a_token_without_text_is_no_answer_yet():
    """A page shows the note until there is a word, and no empty message: many a character is two tokens."""
    generation, more, asked = Generation(), Event(), [{"role": "user", "content": "a question"}]

    def stream() -> Iterator[Any]:
        for text in ("", "a word"):
            generation.prompt_tokens = generation.read_tokens = 7
            generation.tokens = 1
            yield [*asked, {"role": "assistant", "content": text}], asked
            more.wait()

    answer = PageAnswer(generation, stream, (asked, asked))
    shown = answer.follow("en")
    while (said := next(shown)[0][-1])["content"] != "<small>Reading the prompt: 7 of 7 tokens</small>":
        assert said["content"] in ("a question", "<small>Waiting for the model…</small>")
    more.set()
    *_, (said, _) = shown
    assert said[-2]["content"] == "a word"


def test_pages_wait_in_line(tab, slowly):
    from llamafactory_kt.integration.webui.answers import answers_of

    tab.load()
    answers = answers_of(tab.chatter)
    first, second, third = (tab.ask(PROMPTS[2], kt_page=page) for page in ("first", "second", "third"))
    next(first)
    assert [next(asking)[0][-1]["content"] for asking in (second, third)] == [
        f"<small>Waiting in line: the model answers others first ({ahead}).</small>" for ahead in (1, 2)
    ]
    answers.last("second").stop()
    *_, (shown, _) = second
    assert "Stopped before the first word." in shown[-1]["content"] and answers.last("first").running
    for asking in (first, third):
        *_, (shown, _) = asking
        assert shown[-2]["content"] == EXPECTED[PROMPTS[2]]["base"]


def test_a_load_that_is_stopped(tab, monkeypatch):
    going_on, load = Event(), ReferenceEngine.load
    monkeypatch.setattr(ReferenceEngine, "load", lambda *args: going_on.wait() and load(*args))
    loading, unloading = tab.chatter.load_model(tab.data), tab.chatter.unload_model(tab.data)
    next(loading)
    next(unloading)
    going_on.set()
    assert [*unloading][-1] == [*loading][-1] == "The load was stopped." and not tab.chatter.loaded
    loading = tab.chatter.load_model(tab.data)
    next(loading)
    box = tab.manager.get_elem_by_id("infer.info_box")
    opened = next(
        each for each in tab.page.fns.values() if getattr(each.fn, "__name__", "") == "opened" and box in each.outputs
    )
    said = [status for status, *_ in opened.fn("zh", False)]
    assert said[-2].startswith("模型已加载"), "a page that is opened meanwhile follows"
    assert [*loading][-1].startswith("Model loaded")


def test_a_load_ends_with_its_process():
    """A thread that Python killed in PyTorch's C++ would abort it."""
    code = """
    import threading, time
    from llamafactory_kt.ground.progress import with_progress
    from llamafactory_kt.integration.webui.background_load import PageLoad
    begun = threading.Event()
    def work():
        try:
            for _ in with_progress(range(3000), [1] * 3000):
                begun.set(), time.sleep(0.01)
        finally:
            print("ended", flush=True)
    PageLoad(work, switching=False, debug=False)
    begun.wait()
    """
    done = child(code)
    assert (done.returncode, done.stdout) == (0, "ended\n"), done.stderr


def test_errors_name_the_fields(tab, tmp_path):
    tab.set("infer", extra_args='{"kt_bakend": "torch"}', kt_num_threads="many")
    tab.set("top", checkpoint_path=[str(tmp_path / "nowhere")])
    first, *mistakes = tab.load().split("\n")
    assert first.startswith("The model was not loaded. ") and len(mistakes) == 3
    for part in (
        "- kt_bakend: unknown key",
        "- Threads (kt_num_threads) ",
        "- Checkpoint path (adapter_name_or_path): ",
    ):
        assert any(line.startswith(part) for line in mistakes), mistakes
    tab.set("top", lang="zh")
    said = tab.load().split("\n")
    place = next(number for number, line in enumerate(said) if line.startswith("- 线程数 (kt_num_threads) "))
    assert said[place + 1] == "  → 改正数值，或去掉该参数。", "what docs/messages_zh.md says of it"


def test_adapters_that_cannot_be_exchanged(tab, tmp_path, demo):
    from llamafactory_kt.integration.webui.answers import answers_of

    tab.set("top", checkpoint_path=[str(demo / "adapter")])
    assert tab.load().startswith("Model loaded")
    model = tab.chatter.engine.model
    tab.set("top", checkpoint_path=[str(tmp_path / "nowhere")])
    said = tab.load()
    assert said.startswith("The adapter was not exchanged") and f"{tmp_path / 'nowhere'} does not exist" in said
    *_, (_, messages) = tab.ask(PROMPTS[2])
    assert messages[-1]["content"] == EXPECTED[PROMPTS[2]]["adapter"], "the old one is in place"
    tab.set("infer", kt_router_stats=True)
    offer = tab.load()
    assert "with another adapter_name_or_path, kt_router_stats. Press “Load model” again" in offer
    tab.set("infer", kt_router_stats=False)
    tab.set("top", checkpoint_path=[])
    assert tab.load() == "Adapter exchanged; the model stayed loaded." and tab.chatter.engine.model is model
    *_, (_, messages) = tab.ask(PROMPTS[2])
    assert messages[-1]["content"] == EXPECTED[PROMPTS[2]]["base"]
    assert ("LoRA tensors", "no adapter") in load_rows(model)
    assert tab.load() == "The model is already loaded as it is set here." and tab.chatter.engine.model is model
    tab.set("infer", kt_router_stats=True)
    tab.load()
    assert tab.load().startswith("Model loaded") and tab.chatter.engine.model is not model, "asked for twice"

    tab.set("top", checkpoint_path=[str(demo / "adapter")])
    answers = answers_of(tab.chatter)
    for page in ("one", "one", "other"):
        list(tab.ask(PROMPTS[2], kt_page=page))
    one, other = (answers.last(page).counted[1].tokens for page in ("one", "other"))
    assert one > other > 0 and one + other == get_router_stats(tab.chatter.engine.model, 1).tokens
    assert tab.load().startswith("Adapter exchanged")
    assert not get_router_stats(tab.chatter.engine.model, 1).tokens and not answers.last("one").counted


@pytest.mark.skipif(not HAS_SEED, reason="LLaMA-Factory 0.9.5's page has no seed")
def test_seeds_are_honoured(tab):
    tab.set("infer", extra_args='{"do_sample": true}')
    assert tab.load().startswith("Model loaded")

    def answer(seed: int) -> str:
        *_, (_, messages) = tab.ask("hello", max_new_tokens=24, temperature=1.5, top_p=1.0, seed=seed)
        return messages[-1]["content"]

    first, second = answer(1), answer(2)
    assert first != second and (answer(1), answer(2)) == (first, second)


def test_pages_without_use_kt(tab):
    tab.set("infer", use_kt=False)
    assert list(tab.chatter.load_model(tab.data)) == [
        "Loading model...", "Model loaded, now you can chat with your model!",
    ]  # fmt: skip
    *_, (shown, _) = tab.ask(PROMPTS[2], max_new_tokens=4)
    assert [message["role"] for message in shown] == ["assistant"], "no figures"
