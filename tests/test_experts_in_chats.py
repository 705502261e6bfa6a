"""The statistics inside LLaMA-Factory's own chats: ``/experts`` in the terminal, the heat map in the browser."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sysconfig
import time
import urllib.request
from pathlib import Path

import pytest
from test_chat import PROMPTS, answers, chat, config
from test_compare import CHROMIUM

CLI = Path(sysconfig.get_path("scripts")) / "llamafactory-cli"


def test_experts_in_the_terminal(tmp_path, demo):
    lines = [PROMPTS[2], "/experts", PROMPTS[3], " /experts", "exit"]
    result = chat(config(tmp_path, demo, kt_backend="torch", kt_router_stats=True), lines)
    assert result.returncode == 0, result.stderr
    assert len(answers(result)) == 2, "the command is no question to the model"
    counted = [int(part.split(" tokens")[0]) for part in result.stdout.split("Experts: ")[1:]]
    assert len(counted) == 2 and counted[1] > counted[0] > 10
    assert "busiest experts" in result.stdout


def test_experts_without_counting(tmp_path, demo):
    """It says how to count; without use_kt it is a message like any other."""
    result = chat(config(tmp_path, demo, kt_backend="torch"), ["/experts", "exit"])
    assert "load the model with kt_router_stats: true" in result.stdout and not answers(result)
    keys = {"use_kt": None, "kt_backend": None, "kt_num_threads": None, "kt_tp_enabled": None}
    result = chat(config(tmp_path, demo, **keys, max_new_tokens=4), ["/experts", "exit"])
    assert len(answers(result)) == 1, result.stderr


def test_heat_map_in_the_browser(tmp_path, demo):
    playwright = pytest.importorskip("playwright.sync_api")
    if not CHROMIUM.is_file():
        pytest.skip(f"{CHROMIUM} is not installed")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = {
        **os.environ, "GRADIO_SERVER_PORT": str(port), "GRADIO_SERVER_NAME": "127.0.0.1", "GRADIO_ANALYTICS_ENABLED": "0",
    }  # fmt: skip
    path = config(tmp_path, demo, kt_backend="torch", kt_router_stats=True)
    log = (tmp_path / "log").open("w")
    server = subprocess.Popen([CLI, "webchat", path], env=env, stdout=log, stderr=subprocess.STDOUT, cwd=tmp_path)
    try:
        address = f"http://127.0.0.1:{port}"
        for _ in range(600):
            try:
                urllib.request.urlopen(address, timeout=5).close()
                break
            except OSError:
                assert server.poll() is None, (tmp_path / "log").read_text()
                time.sleep(0.3)
        with playwright.sync_playwright() as tool:
            browser = tool.chromium.launch(executable_path=str(CHROMIUM), args=["--no-sandbox"])
            page = browser.new_page(viewport={"width": 1200, "height": 1400})
            page.goto(address)
            picture = page.locator("[data-testid=matplotlib] img")
            picture.wait_for(timeout=60_000)
            seen = [picture.get_attribute("src")]
            for text in PROMPTS[2:4]:
                page.locator("textarea").last.fill(text)
                page.locator("button.primary").click()
                page.wait_for_function(
                    "before => document.querySelector('[data-testid=matplotlib] img')?.src != before", arg=seen[-1], timeout=60_000
                )  # fmt: skip
                page.wait_for_timeout(1500)
                seen.append(picture.get_attribute("src"))
            if shot := os.environ.get("KT_SCREENSHOT"):
                page.screenshot(path=shot)
            browser.close()
        assert len(set(seen)) == 3, "each answer draws it anew"
    finally:
        server.send_signal(signal.SIGINT)
        try:
            server.wait(20)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()
        log.close()
