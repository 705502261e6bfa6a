"""The commands of the chat in the terminal, on a loaded model and without a terminal."""

from __future__ import annotations

import json
import logging
import os
import shutil

import pytest
import typer
from helpers.chats import EXPECTED, PROMPTS, chat_model
from typer.testing import CliRunner

from llamafactory_kt import KTError, KTPathError
from llamafactory_kt.cli.experiments import compare, generate, stats
from llamafactory_kt.integration.prompts import read_prompts
from llamafactory_kt.integration.terminal import questions, short_log
from llamafactory_kt.integration.terminal.commands import COMMANDS, Conversation, counts_experts, run_command

ASKED = [{"role": "user", "content": PROMPTS[0]}]


@pytest.fixture(scope="module")
def loaded(demo):
    return chat_model(demo / "model", demo / "adapter", kt_backend="torch")


@pytest.fixture
def talk(loaded):
    return Conversation(loaded)


class Nothing:
    """A chat whose model is in a server."""

    engine = type("Engine", (), {"generating_args": {"do_sample": True}})


@pytest.mark.parametrize("line", ["", "/", "/usr/bin/python is what?", "//help", " /hlep me", "/help\nme", "help", "/2 is half", "/*", "exit now"])  # fmt: skip
def test_questions(talk, line):
    assert run_command(talk, line) is None


@pytest.mark.parametrize(
    ("line", "told"),
    [("/hlep", "/hlep is no command; did you mean /help?"), ("/xyzzy is a word", "/xyzzy is no command."),
     ("/load", "Usage: /load ADAPTER"), ("/clear it", "Usage: /clear:"), ("/save", "Usage: /save FILE"),
     ("/save x.json", "Nothing has been said"), ("/load /nowhere/adapter", "/nowhere/adapter does not exist"),
     ("/set tempe 1", "tempe cannot be set; did you mean temperature?"), ("/set do_sample maybe", "must be true or false, found 'maybe'"),
     ("/set temperature hot", "must be a number of at least 0, found 'hot'"), ("/set temperature nan", "found 'nan'"),
     ("/set temperature inf", "found 'inf'"), ("/set temperature -1", "found '-1'"), ("/set top_p 1.5", "at most 1"),
     ("/set top_k 2.5", "a whole number"), ("/set repetition_penalty 0", "above 0"), ("/set max_new_tokens 0", "positive"),
     ("/set max_new_tokens", "found ''"), ("/experts", "set kt_router_stats: true in the YAML")],
)  # fmt: skip
def test_refusals(talk, line, told):
    with pytest.raises(KTError) as error:
        run_command(talk, line)
    assert told in str(error.value)
    assert talk.generating == {} and not talk.ended


def test_every_command_is_in_the_help(talk):
    text = run_command(talk, "/help")
    assert all(f"  {name}" in text for name in COMMANDS) and run_command(talk, "/?") == text


@pytest.mark.parametrize("word", ["exit", " exit ", "/exit", "/bye", "/quit", "/EXIT"])
def test_leaving(talk, word):
    assert run_command(talk, word) == "" and talk.ended


def test_the_adapter_is_exchanged(talk, demo, tmp_path):
    def answer():
        return "".join(talk.chat_model.stream_chat(ASKED))

    before, item = run_command(talk, "/adapter"), EXPECTED[PROMPTS[0]]
    assert str(demo / "adapter") in before and "consumed 200 of 200" in before and answer() == item["adapter"]
    assert "base model" in run_command(talk, "/unload") and answer() == item["base"]
    broken = shutil.copytree(demo / "adapter", tmp_path / "broken")
    (broken / "adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(KTError, match="broken"):
        run_command(talk, f"/load {broken}")
    assert "base model" in run_command(talk, "/adapter"), "a refused one changes nothing"
    assert run_command(talk, f"/load {demo / 'adapter'}") == before and answer() == item["adapter"]
    twice = run_command(talk, f"/load {demo / 'adapter'} , {demo / 'adapter'}")
    assert "consumed 400 of 400" in twice
    run_command(talk, f"/load {demo / 'adapter'}")


def test_an_adapter_is_chosen_by_its_name(demo):
    talk = Conversation(chat_model(demo / "model", kt_backend="torch", kt_adapters={"kiki": str(demo / "adapter")}))
    item = EXPECTED[PROMPTS[0]]
    for line, told, answer in (
        ("/adapter", "this is the base model.\n/load chooses among kiki.", item["base"]),
        ("/load kiki", f"kiki: {demo / 'adapter'}: LoRA tensors consumed 200 of 200", item["adapter"]),
        ("/unload", "this is the base model.\n/load chooses among kiki.", item["base"]),
    ):
        assert told in run_command(talk, line)
        assert "".join(talk.chat_model.stream_chat(ASKED)) == answer
    with pytest.raises(KTPathError, match=r"^kik is no directory, and no name in kt_adapters; did you mean kiki\?$"):
        run_command(talk, "/load kik")


def test_what_is_set_reaches_the_model(talk):
    listed = run_command(talk, "/set")
    assert "do_sample false" in listed and "max_new_tokens 1024" in listed
    assert "no effect before /set do_sample true" in run_command(talk, "/set temperature 0.5")
    for line in ("/set max_new_tokens 3", "/set do_sample true", "/set top_p 0.9", "/set top_k 7", "/set repetition_penalty 1.5",
                 "/set skip_special_tokens false", "/set system Be a pirate."):  # fmt: skip
        assert "no effect" not in run_command(talk, line)
    parts = [
        getattr(talk.chat_model.engine, name)
        for name in ("model", "tokenizer", "processor", "template", "generating_args")
    ]
    keys = {**talk.generating}
    prompt, _ = talk.chat_model.engine._process_args(*parts, [*ASKED], system=keys.pop("system"), input_kwargs=keys)
    config = prompt["generation_config"]
    found = [
        getattr(config, name)
        for name in ("max_new_tokens", "do_sample", "temperature", "top_p", "top_k", "repetition_penalty")
    ]
    assert found == [3, True, 0.5, 0.9, 7, 1.5] and config.skip_special_tokens is False
    assert "Be a pirate." in parts[1].decode(prompt["inputs"][0])
    assert 'system "Be a pirate."' in run_command(talk, "/set")
    run_command(talk, "/set do_sample false")
    short = "".join(talk.chat_model.stream_chat(ASKED, **talk.generating))
    assert 0 < len(short) < len(EXPECTED[PROMPTS[0]]["adapter"])


def test_a_saved_conversation_is_a_row_of_a_data_set(talk, tmp_path):
    path = tmp_path / "sub" / "saved.json"
    for question, answer in (("eins\nzwei", "«drei»"), ("四", "")):
        talk.messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    run_command(talk, "/set system Sei kurz.")
    assert "2 questions and answers" in run_command(talk, f"/save {path}")
    (prompt,) = read_prompts(path)  # by LLaMA-Factory's own converters
    assert [*prompt.messages, {"role": "assistant", "content": prompt.reference}] == talk.messages
    assert prompt.system == "Sei kurz." and not prompt.problem
    assert run_command(talk, "/history") == "User: eins\nzwei\nAssistant: «drei»\nUser: 四\nAssistant: "
    talk.messages += talk.messages[:2]
    assert "3 questions" in run_command(talk, f"/save {path}"), "what it has written it may write again"
    assert len(json.loads(path.read_text(encoding="utf-8"))[0]["conversations"]) == 6
    assert "removed" in run_command(talk, "clear") and talk.messages == []
    assert run_command(talk, "/history") == "Nothing has been said."
    talk.messages += [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]
    for taken in (path, tmp_path):
        with pytest.raises(KTError, match="exists; choose another name"):
            run_command(talk, f"/save {taken}")
    assert "eins" in path.read_text(encoding="utf-8")


def test_experts_are_counted(demo):
    talk = Conversation(chat_model(demo / "model", kt_backend="torch", kt_router_stats=True))
    "".join(talk.chat_model.stream_chat(ASKED, max_new_tokens=2))
    assert counts_experts(talk.model) and "busiest experts" in run_command(talk, "/experts")


@pytest.mark.parametrize("line", ["/load x", "/unload", "/adapter", "/experts"])
def test_a_model_in_a_server(line):
    with pytest.raises(KTError, match="needs infer_backend: huggingface"):
        run_command(Conversation(Nothing()), line)
    assert not counts_experts(None)


@pytest.mark.parametrize(
    ("typed", "question"),
    [(["one"], "one"), ([" one "], " one "), (["  "], ""), (["one\ntwo\n"], "one\ntwo"), (['"""one"""'], "one"),
     (['"""one', "", '  two"""'], "one\n\n  two"), (['"""', "one", '"""'], "one"), (['"""one\ntwo"""'], '"""one\ntwo"""'),
     (['"""', '"""'], ""), (['say """one'], 'say """one')],
)  # fmt: skip
def test_typed_lines(monkeypatch, typed, question):
    lines = iter(typed)
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    assert questions.read_question("User: ") == question and not list(lines)


def test_a_line_of_a_pipe_is_a_question(monkeypatch):
    monkeypatch.setattr("builtins.input", lambda prompt: '"""one')
    assert questions.read_question("User: ") == '"""one'


@pytest.mark.parametrize(("level", "short"), [(None, True), ("WARN", True), ("INFO", False), ("debug", False)])
def test_the_log(monkeypatch, level, short):
    """What the user asks for is shown."""
    monkeypatch.delenv("LLAMAFACTORY_VERBOSITY", raising=False)
    if level:
        monkeypatch.setenv("LLAMAFACTORY_VERBOSITY", level)
    handlers = [handler for name in ("llamafactory", "transformers") for handler in logging.getLogger(name).handlers]
    before = [handler.filters for handler in handlers]
    for handler in handlers:
        handler.filters = []
    try:
        short_log.keep_log_short()
        for name, severity, text, matters in (
            ("transformers.configuration_utils", logging.INFO, "Model config", False),
            ("llamafactory.model.loader", logging.INFO, "all params", False),
            ("llamafactory_kt.exchange", logging.INFO, "Loading MoE LoRA", False),
            ("llamafactory_kt.model.on_gpu.placement", logging.INFO, "The GPU now has", False),
            ("llamafactory_kt", logging.INFO, "KTransformers experts", True),
            ("llamafactory_kt.autotune.choose", logging.INFO, "Measuring engines", True),
            ("llamafactory_kt.exchange", logging.WARNING, "kt_lora_scope", True),
            ("transformers.modeling_utils", logging.WARNING, "some weights", True),
        ):
            record = logging.LogRecord(name, severity, "x.py", 1, text, (), None)
            assert all(bool(handler.filter(record)) is (matters or not short) for handler in handlers), text
        assert len(handlers) > 1
    finally:
        for handler, filters in zip(handlers, before, strict=True):
            handler.filters = filters


@pytest.mark.parametrize("command", [generate, compare, stats])
def test_other_commands_are_as_short(monkeypatch, tmp_path, command):
    monkeypatch.delenv("LLAMAFACTORY_VERBOSITY", raising=False)
    app = typer.Typer()
    app.command()(command)
    words = [
        "nowhere.yaml",
        "--input" if command is generate else "--prompts",
        "p.json",
        "--output",
        str(tmp_path / "out"),
    ]
    assert isinstance(CliRunner().invoke(app, words).exception, KTPathError)
    assert os.environ["LLAMAFACTORY_VERBOSITY"] == "WARN"
