"""The whole way from ``infer_backend: sglang`` to an answer, with a stand-in for the server (tests/standin)."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import openai
import pytest
import yaml
from standin_server import alive, configuration, interpreter, notes

from llamafactory_kt import KTConfigError, KTServerError
from llamafactory_kt.cli.serve import model_arguments
from llamafactory_kt.integration.generation import Generation
from llamafactory_kt.serving.command import server_command
from llamafactory_kt.serving.options import discover
from llamafactory_kt.serving.server import Server, free_port, start_server

CLI = Path(sysconfig.get_path("scripts")) / "llamafactory-cli"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LLAMAFACTORY_KT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))


@pytest.fixture
def standin(tmp_path, demo):
    """A command for the stand-in in a mode, and where its notes will be."""

    def standin(fail: str = "", **keys):
        python = interpreter(tmp_path, STANDIN_FAIL=fail, STANDIN_NOTES=str(tmp_path / "notes"))
        path = configuration(tmp_path, python, demo / "model", **keys)
        return path, tmp_path / "notes"

    return standin


@pytest.fixture
def command(standin):
    def command(fail: str = ""):
        path, notes = standin(fail)
        args = model_arguments(path)
        return server_command(args, discover(args.kt_sglang_python)), notes

    return command


def gone(*pids: int) -> bool:
    """Wait for processes to end; a minute is far more than they need."""
    for _ in range(1200):
        if not any(map(alive, pids)):
            return True
        time.sleep(0.05)
    return False


def test_chat_through_the_command_line(standin, demo, tmp_path):
    """Blanks in every path, the adapter in the server's form and named by each request, nothing left behind."""
    blank = tmp_path / "my adapter"
    blank.symlink_to(demo / "adapter")
    path, written = standin(adapter_name_or_path=str(blank), kt_stats=True)
    env = {**os.environ, "LLAMAFACTORY_VERBOSITY": "INFO", "PYTHONIOENCODING": "utf-8"}
    result = subprocess.run(
        [CLI, "chat", path],
        input="hello\nand then?\nexit\n",
        capture_output=True,
        encoding="utf-8",
        env=env,
        timeout=300,
    )
    assert result.returncode == 0, result.stderr
    first, second = (turn.removeprefix("Assistant: ").strip() for turn in result.stdout.split("\nUser: ")[1:3])
    assert first.startswith("lora=lora0 tokens=14 你好\n[prompt 14 tokens")
    answer, figures = second.splitlines()
    tokens = re.fullmatch("lora=lora0 tokens=([0-9]+) 你好", answer)[1]
    assert int(tokens) > 14 and re.match(rf"\[prompt {tokens} tokens, first token after .* s, answer 3 tokens", figures)
    for line in ("SGLang is sglang-kt 0.7.2", "CUDA graph is disabled because"):
        assert line in result.stdout
    started, asked, _ = notes(written)
    assert started["argv"][started["argv"].index("--lora-paths") + 1].startswith("lora0=")
    sampling = asked["request"]["sampling_params"]
    assert sampling["temperature"] == 0.0 and sampling["max_new_tokens"] == 1024 and sampling["stop_token_ids"] == [1]
    assert gone(started["server"], started["child"]) and not list(tmp_path.glob("*.log"))


@pytest.mark.parametrize("killed", ["llamafactory-cli", "supervisor"])
def test_server_ends_with_its_parent(standin, killed):
    """Also where that gets no chance to clean up."""
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
    """It answers /health, but serves another model."""
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


@pytest.mark.parametrize(
    ("fail", "message"),
    [
        ("refuses", "SGLang refused the request (400): "),
        ("breaks-off", "SGLang broke the answer off: {'message': 'out of memory'}"),
        ("dies-while-answering", "SGLang has ended with exit status 9"),
    ],
)
def test_failures_while_answering(standin, fail, message):
    from llamafactory.chat import ChatModel

    path, _ = standin(fail)
    model = ChatModel(yaml.safe_load(path.read_text("utf-8")))
    with pytest.raises(KTServerError) as error:
        list(model.stream_chat([{"role": "user", "content": "hello"}]))
    assert message in str(error.value)
    model.engine._cleanup_server()


def test_python_many_requests_at_once(standin, demo):
    """Streaming, whole answers with their figures, and what a request asks for goes before the configuration."""
    import asyncio

    from llamafactory.chat import ChatModel

    path, written = standin(
        adapter_name_or_path=str(demo / "adapter"), max_new_tokens=7, do_sample=True, temperature=0.5
    )
    model = ChatModel(yaml.safe_load(path.read_text("utf-8")))
    messages = [{"role": "user", "content": "hello"}]
    assert list(model.stream_chat(messages)) == ["lora=lora0", " tokens=14", " 你好"]
    answer = model.chat(messages, temperature=0.9, max_new_tokens=3)[0]
    assert (answer.response_text, answer.prompt_length, answer.finish_reason) == (
        "lora=lora0 tokens=14 你好",
        14,
        "stop",
    )

    async def many():
        return await asyncio.gather(*(model.achat(messages) for _ in range(20)))

    answers = asyncio.run_coroutine_threadsafe(many(), model._loop).result()
    assert {answer[0].response_text for answer in answers} == {"lora=lora0 tokens=14 你好"}
    assert len(model.chat(messages, num_return_sequences=3)) == 3
    first, second = (note["request"]["sampling_params"] for note in notes(written)[1:3])
    assert (first["temperature"], first["max_new_tokens"]) == (0.5, 7)
    assert (second["temperature"], second["max_new_tokens"]) == (0.9, 3)
    with pytest.raises(NotImplementedError):
        model.chat(messages, images=["picture.png"])
    model.engine._cleanup_server()


def test_a_stopped_answer_ends_in_the_server_too(standin):
    """As with Ctrl-C in the terminal."""
    from llamafactory.chat import ChatModel

    path, written = standin("endless")
    model = ChatModel(yaml.safe_load(path.read_text("utf-8")))
    generation, pieces = Generation(), 0
    for _ in model.stream_chat([{"role": "user", "content": "hello"}], kt_generation=generation):
        pieces += 1
        if pieces == 3:
            generation.stop()
    assert pieces in (3, 4) and (generation.prompt_tokens, generation.finish_reason) == (14, "stop")
    while not any("gone" in note for note in notes(written)):
        time.sleep(0.05)
    model.engine._cleanup_server()


def test_a_chat_needs_a_server_that_it_can_talk_to(standin):
    from llamafactory.chat import ChatModel

    path, written = standin(sglang_config={"stream_output": True, "api_key": "secret"})
    with pytest.raises(KTConfigError, match="sglang_config: --stream-output, --api-key cannot be set in a chat"):
        ChatModel(yaml.safe_load(path.read_text("utf-8")))
    assert notes(written) == [], "nothing was started"


def test_without_use_kt_the_stock_engine_is_built(demo):
    code = f"""
    from llamafactory.chat import sglang_engine
    from llamafactory.hparams.parser import _parse_infer_args
    args = _parse_infer_args(dict(model_name_or_path={str(demo / "model")!r}, template="deepseek", infer_backend="sglang"))
    sglang_engine.launch_server_cmd = lambda command: print("stock", command.split()[0]) or exit()
    sglang_engine.SGLangEngine(*args)
    """
    result = subprocess.run(
        [sys.executable, "-c", "\n".join(map(str.strip, code.splitlines()))], capture_output=True, text=True
    )
    assert "stock python3" in result.stdout, result.stderr


def test_serve(standin, tmp_path):
    """A dry run prints a line that a shell can run, and nothing else on stdout; without it the command becomes the server
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
        run = [sys.executable, "-m", "llamafactory_kt", "serve", tmp_path / "c.yaml"]
        result = subprocess.run(run, capture_output=True, text=True)
        assert result.returncode == 1 and message in result.stderr and "Traceback" not in result.stderr


# bench --endpoint


def bench(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-m", "llamafactory_kt", "bench", *arguments], capture_output=True, text=True
    )


def test_bench_of_an_endpoint(command):
    ours, written = command()
    server = start_server(ours, 60)
    try:
        result = bench(
            "--endpoint",
            server.url,
            "--concurrency",
            "1,3",
            "--requests",
            "6",
            "--warm-up",
            "2",
            "--max-tokens",
            "9",
            "--json",
            "-",
        )
        report = json.loads(result.stdout)
        asked = [note["request"] for note in notes(written) if note.get("path") == "/v1/chat/completions"]
        table = bench("--endpoint", server.url + "/v1/", "--requests", "2").stdout
    finally:
        server.close()
    assert report["model"] == ours.parsed.model_path and [x["concurrency"] for x in report["levels"]] == [1, 3]
    for level in report["levels"]:
        assert (level["requests"], level["failed"], level["tokens"], level["counted"]) == (6, 0, 18, True)
        assert 0 < level["first_token_mean"] <= level["mean"] and level["p50"] <= level["p90"] <= level["p99"]
        assert level["total_rate"] == pytest.approx(18 / level["wall"])
    assert len(asked) == 2 + 6 + 6 and len({request["messages"][0]["content"] for request in asked}) == 14
    assert {(request["max_tokens"], request["temperature"], request["stream"]) for request in asked} == {(9, 0, True)}
    assert all(column in table for column in ("p50", "first", "tok/s")), table


def test_llamafactorys_own_api(standin):
    """``llamafactory-cli api`` in front of SGLang: bad requests get status 400, ``n`` answers, and ``bench`` measures it
    although it does not say how many tokens it made."""
    path, _ = standin()
    port = free_port()
    env = {**os.environ, "API_PORT": str(port), "API_HOST": "127.0.0.1"}
    api = subprocess.Popen([CLI, "api", path], env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        while socket.socket().connect_ex(("127.0.0.1", port)) and api.poll() is None:
            time.sleep(0.1)
        result = bench("--endpoint", f"http://127.0.0.1:{port}", "--requests", "3", "--concurrency", "2", "--json", "-")
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)
        messages = [{"role": "user", "content": "hello"}]
        two = client.chat.completions.create(model="any", messages=messages, n=2)
        picture = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "picture.png"}}]}]
        refused = []
        for bad in ({"max_tokens": 10**6}, {"temperature": -1, "stream": True}, {"messages": picture}):
            with pytest.raises(openai.BadRequestError) as error:
                client.chat.completions.create(**{"model": "any", "messages": messages, **bad})
            refused.append(error.value.response.json()["error"]["message"])
    finally:
        api.terminate()
        api.wait()
    assert [choice.message.content for choice in two.choices] == ["lora=None tokens=14 你好"] * 2
    for wanted, found in zip(("context has 4096 tokens", "temperature: -1", "more than text"), refused, strict=True):
        assert wanted in found
    level = json.loads(result.stdout)["levels"][0]
    assert (level["failed"], level["tokens"], level["counted"]) == (0, 9, False), result.stdout


def test_bench_says_what_is_wrong():
    result = bench("--endpoint", f"http://127.0.0.1:{free_port()}")
    assert result.returncode == 1 and "cannot be reached" in result.stderr and "Traceback" not in result.stderr
    assert bench().returncode == bench("--endpoint", "http://x", "--concurrency", "0").returncode == 2
