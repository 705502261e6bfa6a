"""``llamafactory-cli webchat`` and LlamaBoard (``webui``) in a real browser. ``KT_SCREENSHOTS`` keeps the pictures."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers.chats import EXPECTED, PROMPTS, config
from helpers.image_text import make_image_text_model, picture, prompt
from helpers.pages import ask, choose, choose_language, field, open_page, press, redrawn, serve, settle, status
from helpers.places import CHROMIUM
from transformers import AutoTokenizer

AT_ITS_END = """() => {
    const log = document.querySelector('.kt-chat .bubble-wrap')
    return log?.scrollHeight > log?.clientHeight && log.scrollHeight - log.clientHeight - log.scrollTop < 100
}"""
"""whether a conversation that is longer than its window shows the last words"""


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


@pytest.fixture(scope="module")
def webchat(browser, demo, tmp_path_factory) -> Iterator[str]:
    directory = tmp_path_factory.mktemp("webchat")
    adapter = str(demo / "adapter")
    path = config(directory, demo, kt_backend="torch", kt_router_stats=True, adapter_name_or_path=adapter)
    yield from serve(directory, "webchat", str(path))


@pytest.fixture(scope="module")
def board(browser, tmp_path_factory) -> Iterator[str]:
    yield from serve(tmp_path_factory.mktemp("board"), "webui")


def test_webchat(browser, webchat, shots):
    page = open_page(browser, webchat)
    drawn, prompts = [""], []
    page.get_by_role("button", name="Submit", exact=True).wait_for()
    page.get_by_text("Router statistics", exact=True).click()
    page.get_by_text("No answers counted yet.").wait_for()
    assert page.locator(".kt-status").first.inner_text() == "model · adapter adapter · engine torch"
    answer, tokens = ask(page, PROMPTS[2], "Submit", "en")
    assert answer == EXPECTED[PROMPTS[2]]["adapter"]
    drawn.append(redrawn(page, drawn[-1]))
    prompts.append(tokens)
    counts = page.locator(".kt-heat-map").get_attribute("data-counts").split(";")[1].split()
    page.locator(".kt-heat-map image").hover(position={"x": 7.5 * 28, "y": 1.5 * 14})  # the middle of a cell
    page.locator(".kt-cell", has_text=f"layer 2, expert 7: {counts[7]} tokens").wait_for()
    assert re.search(
        rf"[\d.]+ tokens/s · context {tokens + 19} of 1024 tokens", page.locator(".kt-status").first.inner_text()
    )
    page.screenshot(path=shots / "webchat_en.png", full_page=True)
    choose_language(page, "zh", "提交")
    _, tokens = ask(page, PROMPTS[3], "提交", "zh")
    drawn.append(redrawn(page, drawn[-1]))
    page.screenshot(path=shots / "webchat_zh.png", full_page=True)
    press(page, "清空历史")
    page.get_by_text("还没有统计到任何回答。全部对话：").wait_for()
    press(page, "重新统计")
    page.get_by_text("全部对话：").wait_for(state="detached")
    assert prompts[0] + 20 < tokens < prompts[0] + 60, "the first question and answer, without the figures below it"
    page.close()


def test_answers_are_stopped_repeated_and_kept(browser, webchat, shots):
    """Also over a reload and in a second tab. Another browser sees nothing of it."""
    context = browser.new_context()
    page = open_page(context, webchat)
    whole, said, asked = EXPECTED[PROMPTS[2]]["adapter"], "[data-testid=bot]", "[data-testid=user]"
    question, waits = page.locator(".kt-query textarea"), "the model answers others first (1)"

    def begun(text: str = whole[:4]) -> None:
        page.locator(said, has_text=text).wait_for()

    settle(page)
    choose_language(page, "en", "Submit")
    question.fill("")
    question.press("Enter")  # does nothing
    settle(page)
    question.fill(PROMPTS[2])
    question.press("Enter")
    begun()
    press(page, "Stop")
    begun("· stopped")
    part = page.locator(said).first.inner_text().strip()
    assert whole.startswith(part) and part != whole

    press(page, "Regenerate")
    page.locator(said, has_text="stopped").wait_for(state="detached")
    begun()
    page.reload()
    begun("first token after")
    assert page.locator(said).first.inner_text().strip() == whole and page.locator(asked).count() == 1

    second = context.new_page()
    second.goto(webchat)
    second.locator(said, has_text=whole).wait_for()
    second.locator("textarea").locator("visible=true").last.fill(PROMPTS[3])
    press(second, "Submit")
    second.locator(said, has_text=EXPECTED[PROMPTS[3]]["adapter"][:12]).wait_for()
    second.screenshot(path=shots / "webchat_second_tab.png", full_page=True)

    page.bring_to_front()
    assert page.locator(asked).count() == 1, "each tab goes on by itself"
    press(page, "Edit last question")
    page.locator(asked).wait_for(state="detached")
    assert question.input_value() == PROMPTS[2]
    question.fill("word " * 300)  # what the model says to that has no end
    press(page, "Submit")
    begun()
    assert page.evaluate("document.activeElement.tagName") == "TEXTAREA", "the next question can be typed"
    second.locator(".kt-query textarea").fill(PROMPTS[2])
    second.locator(".kt-query textarea").press("Enter")
    second.locator(said, has_text=waits).wait_for()
    second.screenshot(path=shots / "webchat_waiting.png", full_page=True)
    press(second, "Stop")
    second.locator(said, has_text="Stopped before the first word").wait_for()
    second.close()

    page.bring_to_front()
    press(page, "Stop")
    begun("· stopped")
    page.set_viewport_size({"width": 640, "height": 1400})  # where the question alone is longer than its window
    page.locator(".kt-chat .bubble-wrap").evaluate("log => log.scrollTo(0, 0)")
    press(page, "Regenerate")
    page.locator(said, has_text="stopped").wait_for(state="detached")
    begun()
    page.wait_for_function(AT_ITS_END)
    page.reload()
    begun()
    page.wait_for_function(AT_ITS_END)
    role = page.locator(".block", has=page.get_by_text("Role", exact=True)).last
    assert question.bounding_box()["y"] < role.bounding_box()["y"], "right below the conversation"
    press(page, "Clear history")
    page.locator(asked).wait_for(state="detached")
    settle(page)
    assert page.locator(said).count() == 0 and page.get_by_role("button", name="Submit", exact=True).is_enabled()

    stranger = open_page(browser, webchat)
    settle(stranger)
    assert stranger.locator(said).count() == 0
    stranger.close()
    context.close()


def test_webchat_with_a_picture(browser, tmp_path, shots):
    """The prompt has the picture's tokens. Without the picture, the page says what is missing."""
    model = make_image_text_model(tmp_path / "model", "qwen3_vl_moe")
    keys = {"model_name_or_path": str(model), "template": "qwen3_vl_nothink", "kt_backend": "torch"}
    picture(96, 64).save(tmp_path / "picture.png")
    for address in serve(tmp_path, "webchat", str(config(tmp_path, tmp_path, **keys))):
        page = open_page(browser, address)
        page.get_by_role("button", name="Submit", exact=True).wait_for()
        page.locator("input[type=file]").first.set_input_files(tmp_path / "picture.png")
        page.get_by_label("Remove Image").wait_for()
        page.get_by_label("number input for Maximum new tokens").fill("12")  # a random model does not end by itself
        settle(page)
        _, tokens = ask(page, "What is it?", "Submit", "en")
        unexpanded = AutoTokenizer.from_pretrained(model)(prompt("qwen3_vl_moe", "<image>What is it?")).input_ids
        assert tokens == len(unexpanded) - 1 + 24, "a token for each 16 x 16 pixels"
        page.screenshot(path=shots / "webchat_picture.png")
        page.get_by_label("Remove Image").click()
        settle(page)
        page.locator("textarea").locator("visible=true").last.fill("And now?")
        press(page, "Submit")
        page.locator(".toast-body", has_text="images that came with them: 0").wait_for()


def test_board(browser, board, demo, shots):
    """A load that fails; one that works, and its answers; another language, another adapter; and nothing is left after
    unloading."""
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
    assert "Threads (kt_num_threads) must be a positive whole number or auto, found 'many'" in status(
        page, "was not loaded"
    )
    page.get_by_test_id("toast-body").filter(has_text="found 'many'").wait_for()
    page.wait_for_timeout(500)
    page.screenshot(path=shots / "board_en_failed.png")
    assert not page.get_by_text("Layers wrapped").is_visible()

    field(page, "Threads").fill("auto")
    press(page, "Load model")
    progress = status(page, "layer 2 of 3")
    assert re.fullmatch(
        r"Loading the experts: layer 2 of 3 · 0\.\d MiB of 1\.7 MiB · [\d.]+ [KM]iB/s · \d+ s · “Unload model” stops it",
        progress,
    ), progress
    page.screenshot(path=shots / "board_en_loading.png")
    status(page, "Model loaded")
    page.get_by_role("row", name="LoRA tensors no adapter").wait_for()
    page.get_by_text("Router statistics", exact=True).click()
    answer, _ = ask(page, PROMPTS[2], "Submit", "en")
    assert answer == EXPECTED[PROMPTS[2]]["base"]
    redrawn(page, "")
    page.screenshot(path=shots / "board_en_answered.png", full_page=True)

    page.reload()
    page.get_by_role("tab", name="Chat").click()
    page.locator("[data-testid=bot]", has_text=answer).wait_for()
    press(page, "Set the form to what is loaded")
    page.get_by_text("kt_router_stats: true").wait_for()
    settle(page)
    assert field(page, "Chat template").input_value() == "deepseek"

    choose_language(page, "zh", "提交")
    status(page, "模型已加载")  # LLaMA-Factory's language switch says that no model is loaded
    page.get_by_text("KTransformers（MoE 专家在 CPU 上计算）").click()
    assert page.get_by_label("启用 KTransformers").is_checked()
    choose(page, "检查点路径", str(demo / "adapter"))
    press(page, "加载模型")
    status(page, "adapter 已切换")
    page.get_by_role("row", name="LoRA 张量 (LoRA tensors) 已使用 200 / 200").wait_for()
    press(page, "清空历史")
    page.locator("[data-testid=bot]").first.wait_for(state="detached")
    answer, _ = ask(page, PROMPTS[1], "提交", "zh")
    assert answer == EXPECTED[PROMPTS[1]]["adapter"]
    page.screenshot(path=shots / "board_zh_switched.png", full_page=True)

    press(page, "卸载模型")
    status(page, "模型已卸载")
    for gone in (
        page.get_by_text("Layers wrapped"),
        page.locator(".kt-heat-map"),
        page.get_by_text("提交", exact=True),
    ):
        gone.wait_for(state="hidden")
    page.screenshot(path=shots / "board_zh_unloaded.png")
    page.close()


def test_board_left_while_it_loads(browser, board, demo):
    """The load goes on, and the next page that asks for one follows it to the end."""
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
    stayed.get_by_role("row", name="LoRA 张量 (LoRA tensors) 没有 adapter").wait_for()
    ask(stayed, PROMPTS[2], "提交", "zh")
    press(stayed, "加载模型")
    status(stayed, "模型已经按这里的设置加载")
    other = open_page(browser, board)
    other.get_by_role("tab", name="Chat").click()
    press(other, "卸载模型")
    status(other, "模型已卸载")
    other.close()
    stayed.bring_to_front()
    stayed.locator("textarea").locator("visible=true").last.fill("还在吗？")
    press(stayed, "提交")
    stayed.locator(".toast-body", has_text="模型已在另一个标签页或由其他用户卸载").wait_for()
    status(stayed, "模型未加载")
    stayed.locator(".kt-status").first.wait_for(state="hidden")
    stayed.close()
