"""Chats with ``infer_backend: sglang``. A stand-in takes the server's place (helpers/standin)."""

from __future__ import annotations

import re
import time

import pytest
import yaml
from helpers.chats import chat
from helpers.children import child
from helpers.sglang import gone, notes

from llamafactory_kt import KTConfigError, KTServerError
from llamafactory_kt.integration.generation import Generation


def test_chat_through_the_command_line(standin, demo, tmp_path):
    """Every path contains a space; requests name the adapter; and nothing is left behind."""
    blank = tmp_path / "my adapter"
    blank.symlink_to(demo / "adapter")
    path, written = standin(adapter_name_or_path=str(blank), kt_stats=True)
    result = chat(path, ["hello", "and then?", "exit"])
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
    """Streams and whole answers; what a request asks for takes precedence over the configuration."""
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
    result = child(code)
    assert "stock python3" in result.stdout, result.stderr
