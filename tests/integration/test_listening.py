"""Where LLaMA-Factory's servers listen: with use_kt on this machine alone, unless the environment says otherwise; without it as ever."""

from __future__ import annotations

import logging
import sys

import pytest

LAUNCHED = {"api": "API_HOST", "webchat": "GRADIO_SERVER_NAME"}


@pytest.fixture
def launch(monkeypatch, tmp_path):
    """Runs one of the commands up to where it would listen, and gives the address."""
    import uvicorn
    from llamafactory.api import app
    from llamafactory.webui import interface

    path = tmp_path / "chat.yaml"
    listening: list[str] = []

    class Page:
        def queue(self):
            return self

        def launch(self, server_name, **keys):
            listening.append(server_name)

    monkeypatch.setattr(interface, "create_web_demo", Page)
    monkeypatch.setattr(app, "ChatModel", lambda: None)
    monkeypatch.setattr(app, "create_app", lambda chat: None)
    monkeypatch.setattr(uvicorn, "run", lambda app, host, port: listening.append(host))
    monkeypatch.setattr(sys, "argv", ["llamafactory-cli", str(path)])
    for variable in LAUNCHED.values():
        monkeypatch.delenv(variable, raising=False)

    def launch(command: str, use_kt: bool) -> str:
        path.write_text(f"use_kt: {str(use_kt).lower()}\n")
        {"api": app.run_api, "webchat": interface.run_web_demo}[command]()
        return listening.pop()

    return launch


@pytest.mark.parametrize("command", [*LAUNCHED])
def test_addresses(launch, command, monkeypatch, kt_log):
    variable = LAUNCHED[command]
    assert launch(command, use_kt=False) == "0.0.0.0" and not kt_log.text
    assert launch(command, use_kt=True) == "127.0.0.1"
    assert f"set {variable}=0.0.0.0" in kt_log.text and kt_log.records[-1].levelno == logging.WARNING
    assert launch(command, use_kt=False) == "0.0.0.0", "nothing is left behind"
    kt_log.clear()
    monkeypatch.setenv(variable, "192.0.2.1")
    assert launch(command, use_kt=True) == "192.0.2.1" and not kt_log.text


def test_llamaboard_says_where_it_listens(monkeypatch, kt_log):
    from llamafactory_kt.integration.listening import warn_if_open

    monkeypatch.setenv("GRADIO_SERVER_NAME", "127.0.0.1")
    warn_if_open()
    assert not kt_log.text
    monkeypatch.delenv("GRADIO_SERVER_NAME")
    warn_if_open()
    assert "whoever reaches them can load any path" in kt_log.text
