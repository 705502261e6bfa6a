"""The template of a chat, before the model is loaded: LLaMA-Factory has to know it, and the model needs embeddings for what it puts into prompts."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from typing import Any

from ...ground.errors import KTConfigError, KTModelError, describe, name_some
from ...settings.keys import KTArguments
from ...settings.upstream_keys import KEYS, dictionary
from ...settings.values import suggestion

_CONVERSATION = [("user", "1"), ("assistant", "2"), ("user", "3"), ("assistant", "")]
"""what all templates can say: with the end of an answer in it, and the beginning of another"""
_PROMPT = "kt_prompt"
"""attribute of a tokenizer: its template's name, and the token ids of such a conversation's prompt"""


def check_keys(values: Mapping[str, Any], known: Collection[str]) -> None:
    """Refuse misspelt keys, all at once; those that begin with ``kt_`` are among them if there are others.

    Args:
        values: a configuration for a chat, its foreign ``kt_*`` keys in ``kt_config``.
        known: LLaMA-Factory's keys, and ours.

    Raises:
        KTConfigError: Some are unknown.
    """
    wrong = [str(key) for key in values if key not in known]
    if not wrong or os.environ.get("ALLOW_EXTRA_ARGS", "").lower() in ("true", "y", "1"):  # as LLaMA-Factory has it
        return
    ours = KTArguments.__dataclass_fields__
    wrong += [str(key) for key in dictionary(values.get("kt_config")) if key not in ours and key not in KEYS]
    names = " ".join(f"{key}: unknown key{_meant(key, known)}" for key in wrong)
    raise KTConfigError(f"The configuration has keys that nobody reads. {names}")


def _meant(key: str, known: Collection[str]) -> str:
    from transformers import Seq2SeqTrainingArguments

    if key in Seq2SeqTrainingArguments.__dataclass_fields__:
        return ", which is for training; remove it."
    return suggestion(key, known)


def check_text(values: Mapping[str, Any]) -> None:
    """Refuse what LLaMA-Factory takes for text, and is none.

    Raises:
        KTConfigError: A key has another value.
    """
    for key in ("model_name_or_path", "adapter_name_or_path", "template"):
        if not isinstance(value := values.get(key), str | None):
            several = " (several paths have commas between them)" if key.startswith("adapter") else ""
            raise KTConfigError(f"{key} must be text{several}, found {value!r}.")


def check_name(name: str | None) -> None:
    """Refuse a template that LLaMA-Factory does not have.

    Raises:
        KTConfigError: It has none of this name.
    """
    from llamafactory.data.template import TEMPLATES

    if name is not None and name not in TEMPLATES:
        hint = suggestion(str(name), TEMPLATES)
        every = f" It has {', '.join(sorted(TEMPLATES))}." if hint == "." else ""
        raise KTConfigError(f"template: LLaMA-Factory has none called {name!r}{hint}{every}")


def note_prompt(template: Any, tokenizer: Any, name: str | None) -> None:
    """Keep with the tokenizer what its template makes of a conversation, for :func:`check_tokens`."""
    messages = [{"role": role, "content": content} for role, content in _CONVERSATION]
    ids, _ = template.encode_oneturn(tokenizer, messages)
    vars(tokenizer)[_PROMPT] = name, list(ids)


def load_tokenizer(model_args: Any) -> Any:
    """A chat's tokenizer, as LLaMA-Factory loads it.

    Raises:
        KTModelError: There is none, or it cannot be loaded.
    """
    from llamafactory import model

    try:
        return model.load_tokenizer(model_args)["tokenizer"]
    except Exception as error:  # of the libraries, which have many
        reason = describe(error.__cause__ or error)
        raise KTModelError(
            f"{model_args.model_name_or_path}: its tokenizer cannot be loaded: {reason}. Download tokenizer.json, tokenizer_config.json and "
            "their like beside config.json."
        ) from error


def check_prompt(tokenizer: Any, data_args: Any, config: Any, *, resizes: bool) -> None:
    """:func:`check_tokens` with the template that a chat would take.

    Raises:
        KTConfigError: The model has no embeddings for what it says.
    """
    from llamafactory.data import get_template_and_fix_tokenizer

    note_prompt(get_template_and_fix_tokenizer(tokenizer, data_args), tokenizer, data_args.template)
    check_tokens(tokenizer, config, resizes=resizes)


def check_tokens(tokenizer: Any, config: Any, *, resizes: bool) -> None:
    """Refuse a template whose prompts have tokens beyond the model's embeddings; a chat would end at the first of them.

    Args:
        tokenizer: after :func:`note_prompt`; others are taken as they are.
        config: the model's.
        resizes: the embeddings will be made as many as the tokenizer has tokens.

    Raises:
        KTConfigError: There are such tokens.
    """
    name, ids = vars(tokenizer).get(_PROMPT, (None, []))
    rows = config.get_text_config().vocab_size
    beyond = sorted({number for number in ids if number is None or number >= rows}, key=str)
    if beyond and not resizes:
        tokens = name_some(repr(tokenizer.convert_ids_to_tokens(number)) for number in beyond)
        raise KTConfigError(
            f"template: {name} puts {tokens} into prompts, which the model has no embeddings for (it has {rows}). Set template to the one "
            "that the model was made for; or resize_vocab: true, where the adapter was trained with it."
        )
