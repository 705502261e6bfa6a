"""bench --endpoint against servers whose answers are written here. Speeds are never asserted."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

import pytest
from typer.testing import CliRunner

from llamafactory_kt import KTServerError
from llamafactory_kt.cli import app

TEXT = [{"choices": [{"delta": {"role": "assistant"}}]}, *({"choices": [{"delta": {"content": c}}]} for c in "abc")]
USAGE = {"choices": [], "usage": {"completion_tokens": 9}}


class Server(ThreadingHTTPServer):
    """Streams ``events`` with a pause before each, or answers with ``status`` and ``body``."""

    def __init__(self) -> None:
        self.events: list[dict] = [*TEXT, USAGE]
        self.status, self.body, self.models = 200, "", '{"data": [{"id": "first"}, {"id": "second"}]}'
        self.asked: list[dict] = []
        self.keys: set[str | None] = set()
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        assert self.path == "/v1/models"
        self.answer(200, self.server.models)

    def do_POST(self) -> None:
        assert self.path == "/v1/chat/completions"
        self.server.keys.add(self.headers["Authorization"])
        self.server.asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        if self.server.body:
            self.answer(self.server.status, self.server.body)
            return
        self.send_response(200)
        self.end_headers()
        for event in self.server.events:
            time.sleep(0.005)
            self.wfile.write(f"data: {json.dumps(event)}\n\n".encode())
        self.wfile.write(b"data: [DONE]\n\n")

    def answer(self, status: int, body: str) -> None:
        self.send_response(status)
        self.end_headers()
        self.wfile.write(body.encode())

    def log_message(self, *_: object) -> None:
        """Nothing."""


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as server:
        thread = Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def bench(*words: str) -> str:
    result = CliRunner().invoke(app, ["bench", "--endpoint", *words], env={"OPENAI_API_KEY": None})
    if isinstance(result.exception, KTServerError):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.stdout


def test_what_is_asked_and_found(server, tmp_path):
    words = ["--requests", "6", "--warm-up", "2", "--max-tokens", "9", "--prompt", "Hello"]
    found = json.loads(bench(server.url, *words, "--json", "-"))
    assert (found["endpoint"], found["model"], found["requests"]) == (server.url, "first", 6)
    assert (found["tokens"], found["counted"]) == (6 * 9, True)
    assert 0.01 <= found["first_token_mean"] < found["mean"] and found["p50"] <= found["p90"] <= found["p99"]
    assert found["per_request_rate"] > 0
    assert [request["messages"] for request in server.asked] == [
        [{"role": "user", "content": f"{number}. Hello"}] for number in range(1, 9)
    ], "each differs, so that no prefix cache answers"
    asked = {(request["model"], request["max_tokens"], request["temperature"], request["stream"]) for request in server.asked}  # fmt: skip
    assert asked == {("first", 9, 0, True)} and server.keys == {None}

    path = tmp_path / "found.json"
    text = bench(f"{server.url}/v1/", "--model", "second", "--api-key", "k", "--requests", "1", "--json", str(path))
    assert f"second at {server.url}, 1 requests one after the other" in text
    for part in (
        "latency: mean ",
        "ms, p50 ",
        "ms, p90 ",
        "ms, p99 ",
        "first token: mean ",
        "tokens/s after the first",
    ):
        assert part in text, text
    assert "pieces of the stream" not in text
    assert json.loads(path.read_text())["endpoint"] == server.url and server.keys == {None, "Bearer k"}
    assert len(server.asked) == 8 + 3 + 1, "three requests warm up"


def test_tokens_that_the_endpoint_does_not_count(server):
    server.events = TEXT
    found = json.loads(bench(server.url, "--requests", "2", "--json", "-"))
    assert (found["tokens"], found["counted"]) == (6, False)
    assert "(pieces of the stream; the endpoint does not say" in bench(server.url, "--requests", "1")
    server.events = [{"choices": [{"delta": {"reasoning_content": "hm"}}]}]
    assert json.loads(bench(server.url, "--json", "-"))["tokens"] == 10, "thinking counts"
    assert "tokens/s" not in bench(server.url, "--requests", "1"), "one token has no speed"


def test_requests_that_fail(server):
    server.events = [*TEXT, {"error": {"message": "out of memory"}}]
    with pytest.raises(KTServerError, match=r"broke an answer off: .*out of memory"):
        bench(server.url)
    server.status, server.body = 400, "no such model"
    with pytest.raises(KTServerError, match=r"refused a request \(400\): no such model"):
        bench(server.url)
    server.status, server.body = 200, "data: {"
    with pytest.raises(KTServerError, match=r"did not answer a request as it should: JSONDecodeError"):
        bench(server.url)
    assert len(server.asked) == 3, "the first failure ends it"
    server.models = '{"data": []}'
    with pytest.raises(KTServerError, match=r"/v1/models names no model \(.*\); give one with --model"):
        bench(server.url)


def test_addresses_that_lead_nowhere():
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
        for url in (f"http://127.0.0.1:{port}", f"127.0.0.1:{port}", "http://127.0.0.1:port"):
            for model in ([], ["--model", "m"]):
                with pytest.raises(KTServerError, match=r"cannot be reached \(.*\)\. Is the server up"):
                    bench(url, *model)


def test_it_is_an_endpoint_or_a_configuration():
    for words in ([], ["c.yaml", "--endpoint", "http://x"], ["--endpoint", "http://x", "--requests", "0"]):
        assert CliRunner().invoke(app, ["bench", *words]).exit_code == 2
