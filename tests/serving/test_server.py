"""The life of a server process: it starts or says why not, and it ends with its parent."""

from __future__ import annotations

import os
import signal
import subprocess

import pytest
from helpers.places import CLI
from helpers.sglang import alive, gone, notes

from llamafactory_kt import KTServerError
from llamafactory_kt.serving.server import Server, start_server


@pytest.mark.parametrize("killed", ["llamafactory-cli", "supervisor"])
def test_server_ends_with_its_parent(standin, killed):
    """Even if the parent has no chance to clean up."""
    path, written = standin()
    process = subprocess.Popen(
        [CLI, "chat", path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    assert any(b"Welcome" in line for line in process.stdout), "it starts"
    started = notes(written)[0]
    assert alive(started["server"]) and alive(started["child"])
    os.kill(process.pid if killed == "llamafactory-cli" else started["parent"], signal.SIGKILL)
    assert gone(started["server"])
    if killed == "llamafactory-cli":
        assert gone(started["child"], started["parent"])
    else:  # the real server's children watch their parent themselves
        os.kill(started["child"], signal.SIGKILL)
        process.kill()
    process.wait()


def test_failures_while_starting(command):
    failing, written = command("exits-early")
    with pytest.raises(KTServerError) as error:
        start_server(failing, 60)
    for part in ("exit status 3", "expected scalar type BFloat16 but found Float", ".log", "-m sglang.launch_server"):
        assert part in str(error.value)
    assert gone(notes(written)[0]["child"]), "what it had started is cleaned up"

    failing, written = command("never-ready")
    with pytest.raises(KTServerError, match=r"not ready after kt_sglang_timeout: 0.5 s"):
        start_server(failing, 0.5)
    assert gone(*(note["server"] for note in notes(written)[1:]))


def test_a_port_that_was_taken_meanwhile(command, kt_log):
    failing, written = command("port-taken")
    server = start_server(failing, 60)
    try:
        assert "was taken by another" in kt_log.text and len(notes(written)) == 2
    finally:
        server.close()


def test_another_server_on_the_port_is_not_taken_for_ours(command, monkeypatch):
    """It answers /health but serves another model."""
    ours, _ = command()
    first = Server(ours)
    first.wait_until_ready(60)
    monkeypatch.setattr("llamafactory_kt.serving.server.free_port", lambda: first.port)
    ours.parsed.model_path = "/another/model"
    second = Server(ours)
    with pytest.raises(KTServerError, match="was taken by another"):
        second.wait_until_ready(60)
    second.close()
    first.close()
