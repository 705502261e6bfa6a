"""LLaMA-Factory's web pages in a browser: how to serve them, and what a person does on them."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

FIGURES = {
    "en": re.compile(
        r"[\d.]+ tokens/s · prompt (\d+) tokens(?: \(\d+ kept from earlier\))? · first token after [\d.]+ s · answer \d+ tokens"
        r"(?: · stopped| · cut at the maximum of new tokens)?"
    ),
    "zh": re.compile(
        r"[\d.]+ token/s · 提示词 (\d+) 个 token(?:（其中 \d+ 个沿用之前的结果）)? · 首个 token 用时 [\d.]+ 秒 · 回答 \d+ 个 token"
        r"(?: · 已停止| · 达到最大生成长度，已截断)?"
    ),
}
SLOWLY = """
import sys, time
from llamafactory_kt.engines.reference import ReferenceEngine

def slowed(stock, seconds):
    def method(*args):
        time.sleep(seconds)
        return stock(*args)
    return method

ReferenceEngine.load = slowed(ReferenceEngine.load, 0.7)
ReferenceEngine.forward = slowed(ReferenceEngine.forward, 0.03)
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


def serve(directory: Path, *arguments: str) -> Iterator[str]:
    """Run ``llamafactory-cli`` and give its address, until the module's tests are done."""
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


def open_page(browser: Any, address: str) -> Any:
    page = browser.new_page()
    page.set_viewport_size({"width": 1280, "height": 1400})
    page.set_default_timeout(120_000)  # a server that was just started still imports
    page.add_init_script(COUNT_QUESTIONS)
    page.goto(address)
    page.wait_for_function("document.querySelectorAll('[data-testid=block-info]')[0]?.innerText.match(/Language|语言/)")
    return page


def field(page: Any, label: str | re.Pattern) -> Any:
    """The text field or drop-down list with this label."""
    labelled = page.locator(".block", has=page.locator("[data-testid=block-info]", has_text=label))
    return labelled.locator("visible=true").last.locator("input, textarea").first


def choose(page: Any, label: str, value: str) -> None:
    field(page, label).click()
    settle(page)  # a list of checkpoints is read, and its field emptied, when it gets the focus
    field(page, label).fill(value)
    field(page, label).press("Enter")
    settle(page)  # a model's path and template are looked up, and its checkpoints


def settle(page: Any) -> None:
    """Wait until the page expects no more answers: they would overwrite what is typed before they come."""
    page.evaluate("asked = Date.now()")  # what was just done may not have been asked about yet
    page.wait_for_function("asking == 0 && Date.now() - asked > 600")


def press(page: Any, button: str) -> None:
    page.get_by_role("button", name=button, exact=True).click()


def status(page: Any, text: str) -> str:
    """Wait until the status line contains a text, and return the whole line."""
    values = "[...document.querySelectorAll('textarea')].map(e => e.value)"
    try:
        found = page.wait_for_function(f"text => {values}.find(value => value.includes(text))", arg=text)
    except Exception as error:
        raise AssertionError(f"no {text!r} in the page's fields: {page.evaluate(values)}") from error
    return str(found.json_value())


def choose_language(page: Any, language: str, proof: str) -> None:
    """Choose a language and wait for a button that is labelled in it."""
    field(page, re.compile("Language|语言")).click()
    page.get_by_role("option", name=language, exact=True).click()
    page.get_by_role("button", name=proof, exact=True).wait_for()


def ask(page: Any, prompt: str, button: str, language: str) -> tuple[str, int]:
    """Ask a question and watch the answer grow. Returns the answer and the number of prompt tokens in the figures below
    it."""
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
    """Wait until the heat map, whose panel is open, is another picture, and return it."""
    found = page.wait_for_function(
        """before => {
            const now = document.querySelector('.kt-heat-map')?.outerHTML
            return ![undefined, before].includes(now) && now
        }""", arg=before
    )  # fmt: skip
    return str(found.json_value())
