"""No option list of LLaMA-Factory fails to build because of us, whoever else has an option of that name."""

from __future__ import annotations

import dataclasses
from types import ModuleType

import pytest
from helpers.children import CLI, child
from llamafactory.hparams import ModelArguments, parser
from transformers import HfArgumentParser

from llamafactory_kt import KTHookError
from llamafactory_kt.integration.hparams.option_lists import settle_conflicts

LISTS = [name for name, kinds in vars(parser).items() if name.endswith("_ARGS") and isinstance(kinds, list)]
FORKS = """
    import dataclasses
    import transformers
    from transformers import training_args_seq2seq as module
    @dataclasses.dataclass
    class Seq2SeqTrainingArguments(module.Seq2SeqTrainingArguments):  # as in transformers-kt 5.6.0
        kt_config: dict | str | None = dataclasses.field(default=None, metadata={"help": "KTransformers"})
    module.Seq2SeqTrainingArguments = transformers.Seq2SeqTrainingArguments = Seq2SeqTrainingArguments
"""


@pytest.mark.parametrize("name", LISTS)
def test_every_list_can_be_built(name):
    HfArgumentParser(getattr(parser, name))


@pytest.mark.parametrize("command", ["train", "chat"])
def test_help(command):
    result = child(CLI, command, "-h")
    assert result.returncode == 0 and "--use_kt" in result.stdout, result.stderr[-2000:]


def test_training_beside_the_forks():
    """Their TrainingArguments have kt_config, and get it; a chat still has ours."""
    result = child(
        FORKS
        + """
    import sys
    sys.argv = ["llamafactory-cli", "train", "-h"]
    from llamafactory.hparams import parser
    keys = {"model_name_or_path": "m", "output_dir": "/tmp/o", "kt_config": {"kt_lora_rank": 8}}
    parsed = transformers.HfArgumentParser(parser._TRAIN_ARGS).parse_dict(keys)
    print([(type(part).__name__, part.kt_config) for part in parsed if hasattr(part, "kt_config")])
    chat = transformers.HfArgumentParser(parser._INFER_ARGS).parse_dict({"model_name_or_path": "m", "kt_config": {"a": 1}})
    print([part.kt_config for part in chat if getattr(part, "kt_config", None)])
    parser.get_train_args()
    """
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert "[('ModelArguments', None), ('TrainingArguments', {'kt_lora_rank': 8})]" in result.stdout
    assert "[{'a': 1}]" in result.stdout and "--kt_backend" in result.stdout


def module_with(*kinds: type) -> ModuleType:
    module = ModuleType("parser")
    module._INFER_ARGS = [ModelArguments, *kinds]
    return module


def test_a_key_that_another_class_has(kt_log):
    @dataclasses.dataclass
    class Other:
        kt_backend: str = "theirs"

    module = module_with(Other)
    settle_conflicts(module)
    ours, theirs = HfArgumentParser(module._INFER_ARGS).parse_dict(
        {"model_name_or_path": "m", "kt_backend": "x", "kt_num_threads": 3}
    )
    assert (ours.kt_backend, ours.kt_num_threads, theirs.kt_backend) == ("auto", 3, "x")
    assert type(ours).__name__ == "ModelArguments" and type(ours).copyfrom(ours).kt_backend == "auto"
    assert [record.levelname for record in kt_log.records] == ["WARNING"]
    assert "kt_backend is another class's option in _INFER_ARGS, where ours steps back." in kt_log.text


def test_a_list_that_our_keys_break_in_another_way(monkeypatch):
    """LLaMA-Factory keeps its own class there; use_kt says why it is not possible."""
    build = HfArgumentParser.__init__

    def refuse(self, kinds, **more):
        if any(hasattr(kind, "kt_lora_scope") for kind in kinds):
            raise TypeError("no such annotation")
        build(self, kinds, **more)

    monkeypatch.setattr(HfArgumentParser, "__init__", refuse)
    module = module_with()
    with pytest.raises(KTHookError, match="_INFER_ARGS cannot take the kt_\\* keys: no such annotation"):
        settle_conflicts(module)
    assert not hasattr(module._INFER_ARGS[0], "kt_lora_scope") and hasattr(module._INFER_ARGS[0], "use_kt")
