"""``llamafactory-cli webchat`` and LlamaBoard (``webui``) in a real browser. ``KT_SCREENSHOTS`` keeps the pictures."""

from __future__ import annotations

import gc
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from test_chat import EXPECTED, PROMPTS, config
from test_compare import CHROMIUM

FIGURES = {
    "en": re.compile(r"[\d.]+ tokens/s · prompt (\d+) tokens · first token after [\d.]+ s · answer \d+ tokens"),
    "zh": re.compile(r"[\d.]+ token/s · 提示词 (\d+) 个 token · 首个 token 用时 [\d.]+ 秒 · 回答 \d+ 个 token"),
}
SLOWLY = """
import sys, time
from llamafactory_kt.engines.reference import TorchEngine

def slowed(stock, seconds):
    def method(*args):
        time.sleep(seconds)
        return stock(*args)
    return method

TorchEngine.load = slowed(TorchEngine.load, 0.7)
TorchEngine.forward = slowed(TorchEngine.forward, 0.015)
from llamafactory.cli import main
main()
"""
"""llamafactory-cli whose layers take as long as those of real models, so that a browser sees what happens meanwhile"""
COUNT_QUESTIONS = """
asking = 0
asked = Date.now()
const ask = window.fetch
window.fetch = async (...question) => {
    asking += 1
    try { return await ask(...question) } finally { asking -= 1; asked = Date.now() }
}
"""
"""lets a test see whether the page waits for the server"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api")
    if not CHROMIUM.is_file():
        pytest.skip(f"{CHROMIUM} is not installed")
    with playwright.sync_playwright() as tool:
        yield tool.chromium.launch(executable_path=str(CHROMIUM), args=["--no-sandbox"])


@pytest.fixture(scope="module")
def shots(tmp_path_factory) -> Path:
    directory = Path(os.environ.get("KT_SCREENSHOTS") or tmp_path_factory.mktemp("screenshots"))
    directory.mkdir(parents=True, exist_ok=True)
    return directory


def serve(directory: Path, *arguments: str) -> Iterator[str]:
    """Run ``llamafactory-cli`` until the module's tests are done; gives its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = {
        **os.environ, "GRADIO_SERVER_PORT": str(port), "GRADIO_SERVER_NAME": "127.0.0.1", "GRADIO_ANALYTICS_ENABLED": "0",
        "BROWSER": "true",
    }  # fmt: skip
    command, log = [sys.executable, "-c", SLOWLY, *arguments], directory / "log"
    with log.open("w") as output:
        server = subprocess.Popen(command, env=env, stdout=output, stderr=subprocess.STDOUT, cwd=directory)
    try:
        address = f"http://127.0.0.1:{port}"
        for _ in range(600):
            try:
                urllib.request.urlopen(address, timeout=5).close()
                break
            except OSError:
                assert server.poll() is None, log.read_text()
                time.sleep(0.3)
        yield address
    finally:
        server.send_signal(signal.SIGINT)
        try:
            server.wait(20)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


@pytest.fixture(scope="module")
def webchat(browser, demo, tmp_path_factory) -> Iterator[str]:
    directory = tmp_path_factory.mktemp("webchat")
    adapter = str(demo / "adapter")
    path = config(directory, demo, kt_backend="torch", kt_router_stats=True, adapter_name_or_path=adapter)
    yield from serve(directory, "webchat", str(path))


@pytest.fixture(scope="module")
def board(browser, tmp_path_factory) -> Iterator[str]:
    yield from serve(tmp_path_factory.mktemp("board"), "webui")


def open_page(browser: Any, address: str) -> Any:
    page = browser.new_page(viewport={"width": 1280, "height": 1400})
    page.set_default_timeout(40_000)  # a server that was just started still imports
    page.add_init_script(COUNT_QUESTIONS)
    page.goto(address)
    page.wait_for_function("document.querySelectorAll('[data-testid=block-info]')[0]?.innerText.match(/Language|语言/)")
    return page


def field(page: Any, label: str | re.Pattern) -> Any:
    """The text field or the drop-down list with a label."""
    labelled = page.locator(".block", has=page.locator("[data-testid=block-info]", has_text=label))
    return labelled.locator("visible=true").last.locator("input, textarea").first


def choose(page: Any, label: str, value: str) -> None:
    field(page, label).click()
    settle(page)  # a list of checkpoints is read, and its field emptied, when it gets the focus
    field(page, label).fill(value)
    field(page, label).press("Enter")
    settle(page)  # a model's path and template are looked up, and its checkpoints


def settle(page: Any) -> None:
    """Wait until the page has its answers and asks nothing more: what is typed before they come is overwritten."""
    page.evaluate("asked = Date.now()")  # what was just done may not have been asked about yet
    page.wait_for_function("asking == 0 && Date.now() - asked > 600")


def press(page: Any, button: str) -> None:
    page.get_by_role("button", name=button, exact=True).click()


def status(page: Any, text: str) -> str:
    """Wait until the status line has a text; returns all of it."""
    values = "[...document.querySelectorAll('textarea')].map(e => e.value)"
    try:
        found = page.wait_for_function(f"text => {values}.find(value => value.includes(text))", arg=text)
    except Exception as error:
        raise AssertionError(f"no {text!r} in the page's fields: {page.evaluate(values)}") from error
    return str(found.json_value())


def choose_language(page: Any, language: str, proof: str) -> None:
    """Choose a language, and wait until a button has its name in it."""
    field(page, re.compile("Language|语言")).click()
    page.get_by_role("option", name=language, exact=True).click()
    page.get_by_role("button", name=proof, exact=True).wait_for()


def ask(page: Any, prompt: str, button: str, language: str) -> tuple[str, int]:
    """Type a question and see the answer grow; returns it, and how many tokens the figures below it say the prompt had."""
    said = page.locator("[data-testid=bot]")
    before = said.count()
    page.evaluate(
        """() => {
            window.seen = new Set()
            const look = () => window.seen.add([...document.querySelectorAll('[data-testid=bot]')].at(-1)?.innerText.trim())
            window.watcher?.disconnect()
            window.watcher = new MutationObserver(look)
            window.watcher.observe(document.body, {subtree: true, childList: true, characterData: true})
        }"""
    )
    page.locator("textarea").locator("visible=true").last.fill(prompt)
    press(page, button)
    page.wait_for_function("n => document.querySelectorAll('[data-testid=bot]').length == n", arg=before + 2)
    answer, figures = (said.nth(before + n).inner_text().strip() for n in (0, 1))
    pieces = [text for text in page.evaluate("[...window.seen]") if text]
    assert len([text for text in pieces if answer.startswith(text)]) > 2, f"it streams: {pieces}"
    found = FIGURES[language].fullmatch(figures)
    assert found, figures
    return answer, int(found[1])


def redrawn(page: Any, before: str) -> str:
    """Wait until the heat map is another picture, and for the last of several drawings; returns it."""
    page.wait_for_function(
        "before => ![null, undefined, before].includes(document.querySelector('[data-testid=matplotlib] img')?.src)", arg=before
    )  # fmt: skip
    page.wait_for_timeout(1200)
    return str(page.locator("[data-testid=matplotlib] img").get_attribute("src"))


def test_webchat(browser, webchat, shots):
    page = open_page(browser, webchat)
    drawn, prompts = [redrawn(page, "")], []
    page.get_by_role("button", name="Submit", exact=True).wait_for()
    answer, tokens = ask(page, PROMPTS[2], "Submit", "en")
    assert answer == EXPECTED[PROMPTS[2]]["adapter"]
    drawn.append(redrawn(page, drawn[-1]))
    prompts.append(tokens)
    page.screenshot(path=shots / "webchat_en.png")
    choose_language(page, "zh", "提交")
    _, tokens = ask(page, PROMPTS[3], "提交", "zh")
    drawn.append(redrawn(page, drawn[-1]))
    page.screenshot(path=shots / "webchat_zh.png")
    assert len(set(drawn)) == 3, "each answer draws it anew"
    assert prompts[0] + 20 < tokens < prompts[0] + 60, "the first question and answer, without the figures below it"
    page.close()


def test_board(browser, board, demo, shots):
    """A load that fails, one that works, and its answers; another language, another adapter; and nothing is left."""
    page = open_page(browser, board)
    page.get_by_role("tab", name="Chat").click()
    choose(page, "Model name", "Custom")
    field(page, "Model path").fill(str(demo / "model"))
    choose(page, "Chat template", "deepseek")
    page.get_by_text("KTransformers (MoE experts on the CPU)").click()
    page.get_by_label("Use KTransformers").check()
    choose(page, "Expert engine", "torch")
    page.get_by_label("Router statistics").check()
    field(page, "Extra arguments").fill(json.dumps({"do_sample": False}))

    field(page, "Threads").fill("many")
    press(page, "Load model")
    assert "kt_num_threads must be a positive whole number or auto, found 'many'" in status(page, "was not loaded")
    page.get_by_test_id("toast-body").filter(has_text="found 'many'").wait_for()
    page.wait_for_timeout(500)
    page.screenshot(path=shots / "board_en_failed.png")
    assert not page.get_by_text("Layers wrapped").is_visible()

    field(page, "Threads").fill("auto")
    press(page, "Load model")
    progress = status(page, "layer 2 of 3")
    assert re.fullmatch(
        r"Loading the experts: layer 2 of 3 · 0\.\d MiB of 1\.7 MiB · [\d.]+ [KM]iB/s · \d+ s", progress
    ), progress
    page.screenshot(path=shots / "board_en_loading.png")
    status(page, "Model loaded")
    page.get_by_role("row", name="LoRA tensors no adapter").wait_for()
    empty = redrawn(page, "")
    answer, _ = ask(page, PROMPTS[2], "Submit", "en")
    assert answer == EXPECTED[PROMPTS[2]]["base"]
    redrawn(page, empty)
    page.screenshot(path=shots / "board_en_answered.png", full_page=True)

    choose_language(page, "zh", "提交")
    status(page, "模型已加载")  # LLaMA-Factory's language switch says that no model is loaded
    page.get_by_label("启用 KTransformers").wait_for()
    choose(page, "检查点路径", str(demo / "adapter"))
    press(page, "加载模型")
    status(page, "adapter 已切换")
    page.get_by_role("row", name="LoRA tensors consumed 200 of 200").wait_for()
    press(page, "清空历史")
    page.locator("[data-testid=bot]").first.wait_for(state="detached")
    answer, _ = ask(page, PROMPTS[1], "提交", "zh")
    assert answer == EXPECTED[PROMPTS[1]]["adapter"]
    page.screenshot(path=shots / "board_zh_switched.png", full_page=True)

    press(page, "卸载模型")
    status(page, "模型已卸载")
    for gone in (
        page.get_by_text("Layers wrapped"),
        page.locator("[data-testid=matplotlib]"),
        page.get_by_text("提交", exact=True),
    ):
        gone.wait_for(state="hidden")
    page.screenshot(path=shots / "board_zh_unloaded.png")
    page.close()


def test_board_left_while_it_loads(browser, board, demo):
    """The load goes on, and the next page that asks for one follows it to its end."""
    left, stayed = open_page(browser, board), open_page(browser, board)
    for page in (left, stayed):  # both before the load begins: it is over sooner than a page is filled in
        page.get_by_role("tab", name="Chat").click()
        choose_language(page, "zh", "加载模型")
        choose(page, "模型名称", "Custom")
        field(page, "模型路径").fill(str(demo / "model"))
        choose(page, "对话模板", "deepseek")
        field(page, "额外参数").fill(json.dumps({"use_kt": True, "kt_backend": "torch"}))
    press(left, "加载模型")
    status(left, "正在加载专家")
    left.close()
    press(stayed, "加载模型")
    status(stayed, "正在加载专家")
    status(stayed, "模型已加载")
    stayed.get_by_role("row", name="LoRA tensors no adapter").wait_for()
    press(stayed, "卸载模型")
    status(stayed, "模型已卸载")
    stayed.close()


class Board:
    """LlamaBoard's Chat tab without a browser."""

    def __init__(self, demo: Path):
        import gradio
        from llamafactory.webui.components import create_infer_tab, create_top
        from llamafactory.webui.engine import Engine

        with gradio.Blocks():
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

    def ask(self, prompt: str, **changes: Any) -> Iterator[Any]:
        asked = {"max_new_tokens": 1024, "top_p": 0.7, "temperature": 0.95, "skip_special_tokens": True, **changes}
        messages = [{"role": "user", "content": prompt}]
        return self.chatter.stream([], messages, "en", "", "", None, None, None, *asked.values(), True, True)


@pytest.fixture
def tab(tmp_path, demo, monkeypatch) -> Iterator[Board]:
    monkeypatch.chdir(tmp_path)  # LlamaBoard writes its settings there
    board = Board(demo)
    yield board
    board.unload()


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


def test_unloading_ends_answers_and_leaves_nothing(tab):
    for _ in range(2):
        assert tab.load().startswith("Model loaded")
        model = weakref.ref(tab.chatter.engine.model)
        answer = tab.ask(PROMPTS[2])
        next(answer)
        assert tab.unload() == "Model unloaded." and model() is not None, "the answer that is being read holds it"
        *_, (_, messages) = answer  # it ends, and the reader does not wait for ever
        said, whole = messages[-1]["content"], EXPECTED[PROMPTS[2]]["base"]
        assert whole.startswith(said) and len(said) < len(whole)
        del answer
        gc.collect()
        assert model() is None
        assert tab.load().startswith("Model loaded")
        model = weakref.ref(tab.chatter.engine.model)
        *_, (shown, messages) = tab.ask(PROMPTS[2])
        assert FIGURES["en"].search(shown[-1]["content"])
        assert messages[-1] == {"role": "assistant", "content": EXPECTED[PROMPTS[2]]["base"]}
        tab.unload()
        assert model() is None and not tab.chatter._thread.is_alive()


def test_adapters_that_cannot_be_exchanged(tab, tmp_path, demo):
    tab.set("top", checkpoint_path=[str(demo / "adapter")])
    assert tab.load().startswith("Model loaded")
    model = tab.chatter.engine.model
    tab.set("top", checkpoint_path=[str(tmp_path / "nowhere")])
    said = tab.load()
    assert said.startswith("The adapter was not exchanged") and f"{tmp_path / 'nowhere'} does not exist" in said
    *_, (_, messages) = tab.ask(PROMPTS[2])
    assert messages[-1]["content"] == EXPECTED[PROMPTS[2]]["adapter"], "the old one is in place"
    tab.set("infer", kt_lora_scope="attention")
    assert tab.load() == "You have loaded a model, please unload it first.", "more than the adapter has changed"
    tab.set("infer", kt_lora_scope="all")
    tab.set("top", checkpoint_path=[])
    assert tab.load() == "Adapter exchanged; the model stayed loaded." and tab.chatter.engine.model is model
    *_, (_, messages) = tab.ask(PROMPTS[2])
    assert messages[-1]["content"] == EXPECTED[PROMPTS[2]]["base"]
    assert ("LoRA tensors", "no adapter") in model._kt_load_rows


def test_pages_without_use_kt(tab):
    tab.set("infer", use_kt=False)
    assert list(tab.chatter.load_model(tab.data)) == [
        "Loading model...", "Model loaded, now you can chat with your model!",
    ]  # fmt: skip
    *_, (shown, _) = tab.ask(PROMPTS[2], max_new_tokens=4)
    assert [message["role"] for message in shown] == ["assistant"], "no figures"
