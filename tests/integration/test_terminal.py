"""``llamafactory-cli chat`` in a terminal (a pty), with Ctrl-C."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import threading

import pexpect
import pytest
from helpers.chats import EXPECTED, PROMPTS, config
from helpers.models import make_model
from helpers.places import CLI

from llamafactory_kt.integration.generation import Generation
from llamafactory_kt.model.state import kt_state

STATS = re.compile(
    r"\[prompt (\d+) tokens(?: \(\d+ kept from earlier\))?, first token after [\d.]+ s, answer (\d+) tokens at [\d.]+ tokens/s\]"
)


@pytest.fixture(scope="module")
def rambling(tmp_path_factory):
    """A random model, whose answers never end."""
    return make_model(tmp_path_factory.mktemp("model"), "deepseek_v2", max_position_embeddings=100_000)


def start(path, *arguments: str, **environment: str | None) -> pexpect.spawn:
    given = {**os.environ, "LLAMAFACTORY_VERBOSITY": "WARN", "TERM": "dumb", **environment}
    env = {name: value for name, value in given.items() if value is not None}
    command = [str(path), *arguments]
    chat = pexpect.spawn(str(CLI), ["chat", *command], env=env, encoding="utf-8", codec_errors="replace", timeout=120)
    chat.expect("User: ")
    return chat


def test_interrupted_answers(tmp_path, demo, rambling):
    path = config(tmp_path, demo, model_name_or_path=str(rambling), kt_backend="torch", kt_num_threads=None)
    chat = start(path, "max_new_tokens=20000", "kt_stats=true")
    asked = []
    for question in ("one", "two"):
        chat.sendline(question)
        chat.expect("Assistant: .")
        chat.sendintr()
        chat.expect_exact("[stopped]")
        chat.expect(STATS)
        asked.append(int(chat.match[1]))
        assert 0 < int(chat.match[2]) < 20000
        chat.expect("User: ")
    assert asked[1] > asked[0], "the first question and what was answered are in the history"
    chat.sendline("/stats")
    chat.expect_exact("Figures after each answer: off.")
    chat.expect("User: ")
    chat.sendintr()
    chat.expect_exact("Use `exit` or Ctrl-D to leave.")
    chat.sendline("clear")
    chat.expect_exact("History has been removed.")
    chat.expect("User: ")
    chat.sendeof()
    chat.expect(pexpect.EOF)
    chat.close()
    assert chat.exitstatus == 0 and "Traceback" not in chat.before


def test_typed_and_pasted(tmp_path, demo):
    """From the command to the first question there are few lines; several lines are one question, pasted or between triple quotes."""
    adapter, saved = str(demo / "adapter"), tmp_path / "saved.json"
    path = config(tmp_path, demo, kt_backend="torch", kt_num_threads=None, adapter_name_or_path=adapter)
    chat = start(path, TERM="xterm", LLAMAFACTORY_VERBOSITY=None)
    said = [line for line in chat.before.split("\r\n") if line.strip()]  # a progress bar is one
    assert any("LoRA tensors" in line for line in said) and any("Loaded adapter(s)" in line for line in said)
    assert len(said) <= 25 and not any("Model config" in line or "torch_dtype" in line for line in said), chat.before
    assert "\x1b[?2004h" in chat.before, "the terminal shall mark what is pasted"
    assert "`/help`" in chat.before and "`/experts`" not in chat.before, "which is not on"
    pasted = "def f():\n\treturn 1\n\n/help"
    for line, shown in (
        (PROMPTS[2], EXPECTED[PROMPTS[2]]["adapter"]),
        ("/stats", "Figures after each answer: on."),
        (PROMPTS[3], "Assistant: "),
    ):
        chat.send(f"{line}\r")
        chat.expect_exact(shown)
    chat.expect(STATS)
    assert int(chat.match[1]) > 20 and int(chat.match[2]) > 5
    for line, shown in (
        ("clear", "History has been removed."),
        ("/set max_new_tokens 3", "max_new_tokens"),
        ("", "User: "),
    ):
        chat.send(f"{line}\r")
        chat.expect_exact(shown)
    chat.expect("User: ")
    chat.send(f"\x1b[200~{pasted}\n\x1b[201~\r")
    chat.expect("Assistant: ")
    chat.expect("User: ")
    chat.send('"""one\r\rtwo"""\r')
    chat.expect("Assistant: ")
    chat.expect("User: ")
    chat.send("/hlep\r")
    chat.expect_exact("did you mean /help?")
    chat.send(f"/save {saved}\r")
    chat.expect_exact("2 questions and answers.")
    chat.send("/bye\r")
    chat.expect(pexpect.EOF)
    chat.close()
    assert chat.exitstatus == 0
    (row,) = json.loads(saved.read_text(encoding="utf-8"))
    assert [turn["value"] for turn in row["conversations"][::2]] == [pasted, "one\n\ntwo"]


@pytest.mark.nightly
def test_a_pipe_gets_the_conversation_and_nothing_else(tmp_path, demo):
    """In a locale without an encoding, with a line that is no text, while a library prints what it does."""
    path = config(tmp_path, demo, kt_backend="oneDNN", kt_num_threads=None, adapter_name_or_path=str(demo / "adapter"))
    env = {
        **os.environ, "LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0", "DNNL_VERBOSE": "1", "LLAMAFACTORY_VERBOSITY": "INFO",
        "MKL_VERBOSE": "1",
    }  # fmt: skip
    lines = [PROMPTS[0].encode(), b"clear", b"ab\xffcd", b"exit"]
    result = subprocess.run(
        [CLI, "chat", path], input=b"\n".join(lines) + b"\n", capture_output=True, env=env, timeout=300
    )
    said = result.stdout.decode()
    assert result.returncode == 0 and b"onednn_verbose" in result.stderr, result.stderr[-2000:]
    assert "│ LoRA tensors" in said and "Logging error" not in result.stderr.decode(), "the load table"
    talk = said[said.index("Welcome to the CLI") :].partition("\nUser: ")[2]
    first, rest = talk.split("\n\nUser: History has been removed.\n\nUser: Assistant: ")
    assert first == f"Assistant: {EXPECTED[PROMPTS[0]]['adapter']}", "not a line of anything else"
    assert rest.endswith("\n\nUser: ") and "verbose" not in said
    assert "The line has bytes that are no text" in result.stderr.decode()


@pytest.mark.nightly
@pytest.mark.parametrize(
    "environment", [{}, {"LC_ALL": "C"}, {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}, {"PYTHONIOENCODING": "latin-1"}]
)  # fmt: skip
def test_pasted_bytes(tmp_path, demo, environment):
    """Bytes that are no text, then Chinese, then a line, in a terminal that edits lines."""
    path = config(tmp_path, demo, kt_backend="torch", kt_num_threads=None, adapter_name_or_path=str(demo / "adapter"))
    env = {**os.environ, "LLAMAFACTORY_VERBOSITY": "INFO", "TERM": "dumb", **environment}
    chat = pexpect.spawn(str(CLI), ["chat", str(path)], env=env, timeout=120)
    chat.expect_exact(b"User: ")
    if "PYTHONIOENCODING" not in environment:
        assert "│ LoRA tensors" in chat.before.decode()
    for line, shown in ((b"ab\xffcd", b"Assistant: "), (b"clear", b"removed"), (PROMPTS[0].encode(), b"Assistant: ")):
        chat.send(line + b"\n")
        chat.expect_exact(shown)
        chat.expect_exact(b"User: ")
    if "PYTHONIOENCODING" not in environment:
        assert EXPECTED[PROMPTS[0]]["adapter"] in chat.before.decode()
    chat.sendline(b"exit")
    chat.expect(pexpect.EOF)
    chat.close()
    assert chat.exitstatus == 0


@pytest.fixture(scope="module")
def model(rambling):
    from llamafactory.chat import ChatModel

    return ChatModel(
        {"model_name_or_path": str(rambling), "template": "deepseek", "use_kt": True, "kt_backend": "torch",
         "do_sample": False, "max_new_tokens": 20000}
    )  # fmt: skip


def generating() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if "(generate)" in thread.name]


def test_a_reader_that_goes_away_ends_the_generation(model):
    generation = Generation()
    texts = model.stream_chat([{"role": "user", "content": "one"}], kt_generation=generation)
    assert next(texts) is not None and len(generating()) == 1
    thread = generating()[0]
    texts.close()
    del texts
    thread.join(120)
    assert not thread.is_alive() and 0 < generation.tokens < 20000
    assert model.engine.semaphore.locked() is False


def test_an_error_while_generating_reaches_the_reader(model, monkeypatch):
    wrapper = kt_state(model.engine.model).wrappers[0]

    def broken(*args):
        raise RuntimeError("broken on purpose")

    monkeypatch.setattr(wrapper.engine, "forward", broken)
    with pytest.raises(RuntimeError, match="broken on purpose"):
        list(model.stream_chat([{"role": "user", "content": "one"}]))
    monkeypatch.undo()
    assert model.chat([{"role": "user", "content": "one"}], max_new_tokens=3)[0].response_length == 3


def test_history_after_an_interrupt(model, capsys):
    from llamafactory_kt.integration.terminal.chat_model import _answer
    from llamafactory_kt.integration.terminal.commands import Conversation

    class Impatient:
        """Presses Ctrl-C at once: before the first word of the answer, or after it."""

        def __init__(self, words):
            self.words = words

        def stream_chat(self, messages, **keys):
            assert keys["temperature"] == 0.5
            yield from self.words
            os.kill(os.getpid(), signal.SIGINT)

    chat = Conversation(Impatient([]), show_stats=True, generating={"temperature": 0.5})
    _answer(chat, "one")
    assert chat.messages == [] and "[stopped]" in capsys.readouterr().out
    chat.chat_model = Impatient(["a word"])
    _answer(chat, "two")
    assert [m["content"] for m in chat.messages] == ["two", "a word"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize("streamed", [False, True])
def test_stop_strings(model, streamed):
    def ask(**keys):
        messages = [{"role": "user", "content": "one"}]
        if streamed:
            return "".join(model.stream_chat(messages, max_new_tokens=60, **keys))
        return model.chat(messages, max_new_tokens=60, **keys)[0].response_text

    whole = ask()
    middle = next(i for i in range(len(whole) // 2, len(whole)) if whole[i : i + 2].isascii())
    stop = whole[middle : middle + 2]
    generation = Generation()
    cut = ask(stop=["never in there", stop], kt_generation=generation)
    assert cut == whole[: whole.index(stop)] and generation.tokens < 60 and generation.finish_reason == "stop"
    assert ask(stop="never in there") == whole
