"""``llamafactory-kt serve``."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time

from helpers.children import KT, child
from helpers.sglang import notes

from llamafactory_kt.serving.server import free_port


def test_serve(standin, tmp_path):
    """A dry run prints one line for a shell and nothing else on stdout; otherwise the command becomes the server
    itself."""
    path, written = standin(init_special_tokens="desc_init")  # LLaMA-Factory says something about this, on stdout
    serve, port = [sys.executable, "-m", "llamafactory_kt", "serve", path], free_port()
    printed = subprocess.run([*serve, "--dry-run", "--", "--port", str(port)], capture_output=True, text=True)
    assert printed.returncode == 0 and notes(written) == [], printed.stderr
    assert printed.stdout.count("\n") == printed.stdout.count(" \\\n") + 1 and "Falling back" in printed.stderr
    process = subprocess.Popen(["sh", "-c", f"exec {printed.stdout}"])
    while not notes(written):
        time.sleep(0.05)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        refused = subprocess.run([*serve, "--", "--port", str(taken.getsockname()[1])], capture_output=True, text=True)
    assert refused.returncode == 1 and "cannot be used: Address already in use" in refused.stderr
    process.kill()
    process.wait()
    process = subprocess.Popen([*serve, "--", "--port", str(free_port())])
    while len(notes(written)) < 2:
        time.sleep(0.05)
    from_shell, from_command = notes(written)
    assert from_command["server"] == process.pid, "signals of a service manager reach the server"
    assert from_shell["argv"][:-1] == from_command["argv"][:-1]
    process.kill()
    process.wait()
    for note in (from_shell, from_command):
        os.kill(note["child"], signal.SIGKILL)


def test_serve_wants_a_configuration_for_kt(tmp_path):
    for content, message in (("use_kt: false", "with use_kt: true"), ("a: [", "is not valid YAML")):
        (tmp_path / "c.yaml").write_text(content)
        result = child(KT, "serve", tmp_path / "c.yaml")
        assert result.returncode == 1 and message in result.stderr and "Traceback" not in result.stderr
