"""The pictures of the web pages in ``docs/images``, taken anew with the demo's model: ``make pictures``, on a machine that does nothing else."""

from __future__ import annotations

import json
import re
import tempfile
from pathlib import Path
from typing import Any

from playwright.sync_api import sync_playwright

from .chats import PROMPTS, config
from .pages import choose, choose_language, field, open_page, press, serve, settle, status
from .places import CHROMIUM, ROOT

IMAGES, DEMO = ROOT / "docs" / "images", Path("examples", "demo")
STATISTICS = re.compile("^(Router statistics|路由统计)$")
WORDS = {
    "en": {
        "name": "Model name", "path": "Model path", "template": "Chat template", "adapter": "Checkpoint path", "extra": "Extra arguments",
        "section": "KTransformers (MoE experts on the CPU)", "use": "Use KTransformers", "engine": "Expert engine",
        "count": "Router statistics", "load": "Load model", "loaded": "Model loaded",
    },
    "zh": {
        "name": "模型名称", "path": "模型路径", "template": "对话模板", "adapter": "检查点路径", "extra": "额外参数",
        "section": "KTransformers（MoE 专家在 CPU 上计算）", "use": "启用 KTransformers", "engine": "专家引擎", "count": "统计路由",
        "load": "加载模型", "loaded": "模型已加载",
    },
}  # fmt: skip


def take(page: Any, name: str, first: Any = None, last: Any = None) -> None:
    """A picture as wide as the page, from one element to another; all of it, if none are given, without title and footer."""
    first = first or page.locator(".block", has=page.locator("[data-testid=block-info]")).first
    last = last or page.locator(".block", has=page.get_by_text(STATISTICS)).last
    page.mouse.move(0, 0)
    begin, end = first.bounding_box(), last.bounding_box()
    top, height = page.evaluate("scrollY") + begin["y"] - 16, end["y"] + end["height"] - begin["y"] + 32
    page.screenshot(
        path=IMAGES / f"{name}.png", full_page=True, clip={"x": 0, "y": top, "width": 1280, "height": height}
    )
    print(IMAGES / f"{name}.png")


def ask(page: Any, question: str) -> None:
    """Ask, and wait for the answer and its figures."""
    said = page.locator("[data-testid=bot]").count()
    page.locator(".kt-query textarea").fill(question)
    page.locator(".kt-query textarea").press("Enter")
    page.wait_for_function("n => document.querySelectorAll('[data-testid=bot]').length == n", arg=said + 2)
    settle(page)


def webchat(browser: Any, directory: Path) -> None:
    """Two answers, and the heat map of their experts."""
    path = config(
        directory, DEMO, kt_backend="native", kt_router_stats=True, adapter_name_or_path=str(DEMO / "adapter")
    )
    for page in (open_page(browser, address) for address in serve(directory, "webchat", str(path))):
        page.get_by_text(STATISTICS).click()
        for question in PROMPTS[2:]:
            ask(page, question)
        take(page, "webchat")


def board(browser: Any, directory: Path, language: str) -> None:
    """What is loaded, and an answer; and a load, by an engine that is slow."""
    said = WORDS[language]
    for page in (open_page(browser, address) for address in serve(directory, "webui")):
        page.get_by_role("tab", name="Chat").click()
        choose_language(page, language, said["load"])
        choose(page, said["name"], "Custom")
        field(page, said["path"]).fill(str(DEMO / "model"))
        choose(page, said["template"], "deepseek")
        choose(page, said["adapter"], str(DEMO / "adapter"))
        field(page, said["extra"]).fill(json.dumps({"do_sample": False}))
        page.get_by_text(said["section"]).click()
        page.get_by_label(said["use"]).check()
        page.get_by_label(f"{said['count']} (kt_router_stats)").check()
        choose(page, said["engine"], "native")
        press(page, said["load"])
        status(page, said["loaded"])
        ask(page, PROMPTS[2])
        take(page, "llamaboard" if language == "en" else f"llamaboard_{language}")
        if language == "en":
            choose(page, said["engine"], "torch")
            for shown in ("is still loaded", "layer 2 of 3"):
                press(page, said["load"])
                status(page, shown)
            button = page.get_by_role("button", name=said["load"], exact=True)
            take(page, "llamaboard_loading", button, page.locator("textarea[disabled]").locator("visible=true").first)


if __name__ == "__main__":
    with sync_playwright() as tool, tempfile.TemporaryDirectory() as made:
        (Path(made) / DEMO.parts[0]).symlink_to(ROOT / DEMO.parts[0])
        chromium = tool.chromium.launch(executable_path=str(CHROMIUM), args=["--no-sandbox"])
        webchat(chromium, Path(made))
        for language in WORDS:
            board(chromium, Path(made), language)
