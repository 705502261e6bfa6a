"""The file of answers, which a run continues after it was killed."""

from __future__ import annotations

import json

import pytest

from llamafactory_kt import KTAdapterError, KTDataError
from llamafactory_kt.integration.prompts import make_prompts
from llamafactory_kt.tools.experiments.answers import AnswerFile
from llamafactory_kt.tools.experiments.generating import Answer

TEXTS = ["Hello, who are you?", "什么是 LoRA？", "Tell me a joke.", "你好，请介绍一下你自己。", "什么是混合专家模型？"]


def test_the_file_of_answers(tmp_path):
    prompts = make_prompts(TEXTS)
    path, keys = tmp_path / "answers.jsonl", {"a": 1}
    first = AnswerFile(path, prompts, keys)
    first.add([Answer(2, "two"), Answer(1, error="why")])
    with path.open("a") as file:
        file.write('{"index": 3, "key": ')  # killed while writing
    again = AnswerFile(path, prompts, keys)
    assert list(again.lines) == [2], "the error is tried again, the torn line is gone"
    again.add([Answer(0, "zero")])
    again.sort()
    assert [json.loads(line)["index"] for line in path.read_text().splitlines()] == [0, 2]
    for changed, other in (({"a": 2}, prompts), (keys, make_prompts(["x", "y", "z"]))):
        with pytest.raises(KTDataError, match="line 1 answers another prompt, or was made by another configuration"):
            AnswerFile(path, other, changed)
    kept, anew = path.read_text(), AnswerFile(path, prompts, {"a": 2}, overwrite=True)
    assert not anew.lines and path.read_text() == kept, "until there are others: the load may fail"
    anew.add([Answer(3, "three")])
    assert [json.loads(line)["index"] for line in path.read_text().splitlines()] == [3]
    path.write_text("my notes\n")
    with pytest.raises(KTDataError, match="line 1 is no answer of an earlier run"):
        AnswerFile(path, prompts, keys)
    assert path.read_text() == "my notes\n", "a file that is none of ours stays"
    with pytest.raises(KTAdapterError, match="is a directory, and a file is to be written"):
        AnswerFile(tmp_path, prompts, keys)
    AnswerFile(tmp_path / "new.jsonl", prompts, keys)
    assert [file.name for file in tmp_path.iterdir()] == ["answers.jsonl"], "nothing is left before there are answers"
