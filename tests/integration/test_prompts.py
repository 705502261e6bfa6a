"""Files of prompts: the forms that rows may have, and malformed rows."""

from __future__ import annotations

import json

import pytest

from llamafactory_kt import KTConfigError, KTDataError, KTPathError
from llamafactory_kt.integration.chat_config import read_yaml
from llamafactory_kt.integration.prompts import convert, read_prompts


def turn(role, content, names=("from", "value")):
    return dict(zip(names, (role, content), strict=True))


def test_forms_of_prompts():
    """Each form becomes what LLaMA-Factory makes of it; a conversation may end with the user."""
    alpaca = convert(0, {"instruction": "a", "input": "b", "output": "c", "system": "s", "history": [["x", "y"]]})
    assert [m["content"] for m in alpaca.messages] == ["x", "y", "a\nb"] and alpaca.text == "a\nb"
    assert alpaca.system == "s" and alpaca.reference == "c"
    assert convert(0, {"prompt": "only this"}).text == "only this"
    sharegpt = [turn("system", "s"), turn("human", "q"), turn("gpt", "a"), turn("human", "q2")]
    openai = [
        turn(role, m["value"], ("role", "content"))
        for role, m in zip(("system", "user", "assistant", "user"), sharegpt, strict=True)
    ]
    for row in ({"conversations": sharegpt}, {"messages": openai}):
        prompt = convert(0, row)
        assert [(m["role"], m["content"]) for m in prompt.messages] == [
            ("user", "q"),
            ("assistant", "a"),
            ("user", "q2"),
        ]
        assert prompt.system == "s" and prompt.reference == "" and not prompt.problem
    with_answer = convert(0, {"messages": [*openai, turn("assistant", "r", ("role", "content"))]})
    assert with_answer.reference == "r" and with_answer.messages == prompt.messages


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ([1], "must be a dictionary, found list"),
        ({}, "expected instruction, prompt, messages or conversations, found nothing"),
        ({"instruction": 3}, "expected instruction"),
        ({"messages": []}, "list of messages that is not empty"),
        ({"messages": [{"role": "user", "content": None}]}, "needs the texts role and content"),
        ({"messages": [{"role": "assistant", "content": "a"}, {"role": "user", "content": "b"}]}, "must alternate"),
        ({"instruction": "a", "images": ["x.png"]}, "x.png is no file, neither in /"),
        ({"instruction": "a", "videos": [["x.png"]]}, "x.png is no file, neither in /"),
        ({"instruction": "a", "history": [["x"]]}, "malformed"),
    ],
)
def test_malformed_rows(row, problem):
    assert problem in convert(0, row).problem


def test_media(tmp_path):
    """Relative to media_dir, or to the file of prompts; what a program gives stays as it is."""
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "a.png").touch()
    for folder, name in ((None, "pictures/a.png"), (tmp_path / "pictures", "a.png")):
        (tmp_path / "rows.jsonl").write_text(
            json.dumps({"instruction": "?", "images": name, "videos": [[name, name]], "audios": []})
        )
        (prompt,) = read_prompts(tmp_path / "rows.jsonl", folder)
        found = str(tmp_path / "pictures" / "a.png")
        assert prompt.media == {"images": [found], "videos": [[found, found]]} and not prompt.problem
    given = [b"bytes", {"bytes": b"", "path": None}]
    assert convert(0, {"instruction": "?", "images": given}).media == {"images": given}


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(KTPathError, match="does not exist"):
        read_prompts(tmp_path / "none.jsonl")
    for name, text, message in [
        ("a.jsonl", "\n\n", "holds no prompts"),
        ("b.json", "{}", "must be a list of rows, found dict"),
        ("c.json", "[", "not valid JSON"),
    ]:
        (tmp_path / name).write_text(text)
        with pytest.raises(KTDataError, match=message):
            read_prompts(tmp_path / name)
    (tmp_path / "c.yaml").write_text("- 1")
    with pytest.raises(KTConfigError, match="must be a mapping of keys to values"):
        read_yaml(tmp_path / "c.yaml")
