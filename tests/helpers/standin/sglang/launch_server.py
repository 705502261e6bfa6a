"""Answers every prompt with what it was asked, piece by piece. STANDIN_FAIL makes it fail in the ways servers do.

It starts a child process that sleeps, as the real server starts schedulers, and notes all process ids in STANDIN_NOTES.
"""

import argparse
import contextlib
import errno
import itertools
import json
import os
import subprocess
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from sglang.srt.server_args import ServerArgs

parser = argparse.ArgumentParser()
ServerArgs.add_cli_args(parser)
args = parser.parse_args()
fail = os.environ.get("STANDIN_FAIL", "")
started = time.monotonic()
# An adapter with experts and the rest: the real one refuses requests that do not name it.
merged = next((path.partition("=")[0] for path in args.lora_paths or [] if path.endswith("/merged")), None)
notes = Path(os.environ.get("STANDIN_NOTES", os.devnull))


def note(**what):
    with notes.open("a") as file:
        file.write(json.dumps(what) + "\n")


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def answer(self, status, content):
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def events(self, events):
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Connection", "close")
        self.end_headers()
        self.close_connection = True
        with contextlib.suppress(ConnectionError):  # the client has gone
            for event in itertools.chain(map(json.dumps, events), ["[DONE]"]):
                self.wfile.write(f"data: {event}\n\n".encode())
                self.wfile.flush()

    def do_GET(self):
        if self.path == "/health":
            ready = time.monotonic() - started > 0.3 and fail != "never-ready"
            self.answer(200 if ready else 503, {})
        elif self.path == "/get_model_info":
            self.answer(200, {"model_path": args.model_path})
        elif self.path == "/v1/models":
            self.answer(200, {"object": "list", "data": [{"id": args.model_path, "object": "model"}]})
        else:
            self.answer(404, {"error": "no such path"})

    def do_POST(self):
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        note(path=self.path, request=request)
        if fail == "dies-while-answering":
            os._exit(9)
        if merged and merged not in (request.get("lora_path"), request.get("model", "").partition(":")[2]):
            self.answer(400, {"error": {"message": f"Every request must select exactly that adapter: {merged}"}})
        elif fail == "refuses":
            self.answer(400, {"error": {"message": "lora0 is not loaded"}})
        elif self.path == "/generate":
            self.generate(request)
        elif self.path == "/v1/chat/completions":
            self.complete(request)
        else:
            self.answer(404, {"error": "no such path"})

    def generate(self, request):
        words = f"lora={request.get('lora_path')} tokens={len(request['input_ids'])} 你好".split(" ")
        texts = [" ".join(words[:count]) for count in range(1, len(words) + 1)]
        meta = {"prompt_tokens": len(request["input_ids"]), "finish_reason": None}
        events = [{"text": text, "meta_info": {**meta, "completion_tokens": n + 1}} for n, text in enumerate(texts)]
        events[-1]["meta_info"]["finish_reason"] = {"type": "stop", "matched": 1}
        if fail == "breaks-off":
            events[1:] = [{"error": {"message": "out of memory"}}]
        if fail == "endless":
            events = self.without_end(meta)
        self.events(events)

    def without_end(self, meta):
        """An answer that grows until nobody reads it any more."""
        try:
            for count in range(1, 6000):
                yield {"text": "word " * count, "meta_info": {**meta, "completion_tokens": count}}
                time.sleep(0.01)
        except GeneratorExit:
            note(gone=True)
            raise

    def complete(self, request):
        pieces = ["Hello", " there", "!"]
        usage = {"prompt_tokens": 5, "completion_tokens": len(pieces), "total_tokens": 5 + len(pieces)}
        common = {"id": "1", "object": "chat.completion.chunk", "created": 0, "model": request["model"]}
        if not request.get("stream"):
            message = {"role": "assistant", "content": "".join(pieces)}
            choices = [{"index": 0, "message": message, "finish_reason": "stop"}]
            return self.answer(200, {**common, "object": "chat.completion", "choices": choices, "usage": usage})
        events = [
            {**common, "choices": [{"index": 0, "delta": {"content": piece}, "finish_reason": None}]}
            for piece in pieces
        ]
        if request.get("stream_options", {}).get("include_usage"):
            events.append({**common, "choices": [], "usage": usage})
        return self.events(events)


child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
note(server=os.getpid(), child=child.pid, argv=sys.argv[1:], parent=os.getppid())
if fail == "exits-early":
    print("RuntimeError: expected scalar type BFloat16 but found Float", file=sys.stderr)
    sys.exit(3)
if fail == "port-taken" and len(notes.read_text().splitlines()) == 1:
    squatter = ThreadingHTTPServer((args.host, args.port), Handler)  # somebody else, who was quicker
    pid = os.fork()
    if pid == 0:
        os.setsid()
        Handler.do_GET = lambda self: self.answer(200, {"model_path": "/another/model"})
        squatter.timeout = 1
        end = time.monotonic() + 60
        while time.monotonic() < end:
            squatter.handle_request()
        os._exit(0)
    print(OSError(errno.EADDRINUSE, "address already in use"), file=sys.stderr)
    sys.exit(1)
ThreadingHTTPServer.request_queue_size = 256
server = ThreadingHTTPServer((args.host or "127.0.0.1", args.port), Handler)
server.serve_forever()
