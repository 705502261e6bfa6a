"""A chat loaded through LLaMA-Factory: its model, its template, its generating arguments."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from ..adapters import AdapterSet
from ..ground.errors import KTConfigError, KTError
from . import bootstrap
from .chat_config import open_configured, parse, parse_from, read_yaml
from .hf_engine import TEXT
from .hparams import template
from .known_versions import PARAMETERS
from .media import add_token_types
from .patching import expect
from .prompts import Prompt


class Encoded(NamedTuple):
    """What ``generate`` takes."""

    ids: list[int]
    """of the prompt"""
    config: Any
    """GenerationConfig"""
    media: dict[str, Any]
    """tensors of pictures, videos and sound, and ``mm_token_type_ids`` [1, T], where the model takes them"""


def import_chat() -> Any:
    """LLaMA-Factory's class ``ChatModel``, hooked. The import is slow."""
    bootstrap.activate()
    from llamafactory.chat import ChatModel

    return ChatModel


def load_tokenizer(config: Mapping[str, Any]) -> tuple[Any, int]:
    """(the tokenizer of a chat, the size of the model's vocabulary), without the model.

    Raises:
        KTModelError: There is no tokenizer, or it cannot be loaded.
    """
    import_chat()
    args = parse(dict(config))
    from llamafactory import model

    tokenizer = template.load_tokenizer(args)
    return tokenizer, model.load_config(args).get_text_config().vocab_size


@dataclass
class LoadedChat:
    """The engine of a ``ChatModel`` with ``infer_backend: huggingface``, and the configuration it was loaded from."""

    engine: Any
    config: Mapping[str, Any]
    """empty for a ``ChatModel`` that a program loaded itself"""

    @classmethod
    def load(cls, config: Mapping[str, Any]) -> LoadedChat:
        """Load a configuration as ``llamafactory-cli chat`` does, with or without ``use_kt``.

        Raises:
            KTConfigError: ``infer_backend`` is not huggingface, LLaMA-Factory refuses the configuration, or, with ``use_kt``, a key is wrong.
            KTError: With ``use_kt``, another of our checks failed.
        """
        backend = config.get("infer_backend", "huggingface")
        if backend != "huggingface":
            raise KTConfigError(f"infer_backend: {backend} cannot be used here; use infer_backend: huggingface.")
        chat_model = import_chat()
        try:
            return cls.of(chat_model(dict(config)), config)
        except KTError:
            raise
        except Exception:
            parse_from("The configuration", dict(config))  # which is an error in a line, if that is what is wrong
            raise

    @classmethod
    def load_yaml(cls, path: Path, overrides: Sequence[str] = ()) -> LoadedChat:
        """Load a YAML that asks for ``use_kt``.

        Raises:
            KTError: One of our checks failed.
            KTConfigError: LLaMA-Factory refuses the configuration, or it does not set ``use_kt``.
        """
        config = read_yaml(path, overrides)
        bootstrap.activate()
        model_args = parse_from(path, config)
        if not model_args.use_kt:
            raise KTConfigError(f"{path} does not ask for use_kt, so there are no KT experts to look at.")
        chat = cls.load(config)
        chat.model_args = model_args
        return chat

    @classmethod
    def of(cls, chat_model: Any, config: Mapping[str, Any] | None = None) -> LoadedChat:
        """Use a loaded ``ChatModel``.

        Raises:
            KTConfigError: It has another engine than ``HuggingfaceEngine``.
            KTHookError: The engine is not one of a known LLaMA-Factory.
        """
        from llamafactory.chat.hf_engine import HuggingfaceEngine

        expect(HuggingfaceEngine, "_process_args")
        if not isinstance(chat_model.engine, HuggingfaceEngine):
            raise KTConfigError("The ChatModel has another engine; load it with infer_backend: huggingface.")
        return cls(chat_model.engine, config or {})

    @property
    def model(self) -> Any:
        return self.engine.model

    def set_generating(self, keys: Mapping[str, Any]) -> None:
        """From now on, generate with these keys over LLaMA-Factory's defaults."""
        from llamafactory.hparams import GeneratingArguments

        self.engine.generating_args = GeneratingArguments(**keys).to_dict()

    @property
    def tokenizer(self) -> Any:
        return self.engine.tokenizer

    @cached_property
    def model_args(self) -> Any:
        """LLaMA-Factory's model arguments, parsed from ``config``."""
        return parse(dict(self.config))

    @cached_property
    def checkpoint(self) -> Path:
        """The local directory of the base model."""
        from huggingface_hub import snapshot_download

        args = self.model_args
        path = Path(args.model_name_or_path).expanduser()
        if path.is_dir():
            return path
        where = {"revision": args.model_revision, "cache_dir": args.cache_dir}
        return Path(snapshot_download(str(path), **where, local_files_only=True))  # the load has put it into the cache

    @cached_property
    def adapters(self) -> AdapterSet:
        """The configuration's adapters, opened from their files."""
        return open_configured(self.model_args)

    def encode(self, prompt: Prompt, **generating: Any) -> Encoded:
        """A prompt as LLaMA-Factory's chat makes it for the model.

        Raises:
            KTDataError: With KT experts, the prompt's media cannot be read or placed.
        """
        parts = (getattr(self.engine, name) for name in PARAMETERS[:5])
        messages = [dict(message) for message in prompt.messages]
        asked = {"system": prompt.system or None, "tools": prompt.tools or None, "input_kwargs": dict(generating)}
        kwargs, _ = self.engine._process_args(*parts, messages, **asked, **prompt.media)
        # also for stock models: what a comparison shows is not what LLaMA-Factory leaves out
        add_token_types(kwargs, self.model, self.engine.processor)
        text = TEXT | {"stopping_criteria", "custom_generate"}
        media = {name: value for name, value in kwargs.items() if name not in text} if prompt.media else {}
        return Encoded(kwargs["inputs"][0].tolist(), kwargs["generation_config"], media)

    def encode_reference(self, prompt: Prompt) -> list[int]:
        """Token ids of the row's own answer with the template's suffix, as in training."""
        pair = [*prompt.messages, {"role": "assistant", "content": prompt.reference}]
        _, ids = self.engine.template.encode_oneturn(self.tokenizer, pair, prompt.system or None, prompt.tools or None)
        return list(ids)
