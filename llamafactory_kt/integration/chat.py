"""A chat loaded through LLaMA-Factory: its model, its template, its generating arguments."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ..adapters import AdapterSet
from ..ground.errors import KTConfigError
from . import bootstrap
from .chat_config import open_configured, parse, parse_from, read_yaml
from .patching import expect
from .prompts import Prompt

_PROCESS_ARGS = (
    "model", "tokenizer", "processor", "template", "generating_args", "messages", "system", "tools", "images", "videos",
    "audios", "input_kwargs",
)  # fmt: skip


def import_chat() -> Any:
    """LLaMA-Factory's class ``ChatModel``, hooked; its imports take some seconds."""
    bootstrap.activate()
    from llamafactory.chat import ChatModel

    return ChatModel


@dataclass
class LoadedChat:
    """What is needed to answer prompts; the engine of LLaMA-Factory's ``ChatModel`` for ``infer_backend: huggingface``."""

    engine: Any
    config: Mapping[str, Any]
    """the keys that it was loaded from; empty for a ``ChatModel`` that was loaded elsewhere"""

    @classmethod
    def load(cls, config: Mapping[str, Any]) -> LoadedChat:
        """Load a configuration as ``llamafactory-cli chat`` does, with or without ``use_kt``.

        Raises:
            KTConfigError: Another ``infer_backend``; with ``use_kt``, also what is wrong with the keys.
        """
        backend = config.get("infer_backend", "huggingface")
        if backend != "huggingface":
            raise KTConfigError(f"infer_backend: {backend} cannot be used here; use infer_backend: huggingface.")
        chat_model = import_chat()
        return cls.of(chat_model(dict(config)), config)

    @classmethod
    def load_yaml(cls, path: Path, overrides: Sequence[str] = ()) -> LoadedChat:
        """Load a YAML that asks for ``use_kt``.

        Raises:
            KTError: Of one of our own checks.
            KTConfigError: LLaMA-Factory refuses the configuration, or it does not ask for ``use_kt``.
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
        """Use a ``ChatModel`` that is loaded already."""
        from llamafactory.chat.hf_engine import HuggingfaceEngine

        expect(HuggingfaceEngine, "_process_args", _PROCESS_ARGS)  # type: ignore[arg-type]
        if not isinstance(chat_model.engine, HuggingfaceEngine):
            raise KTConfigError("The ChatModel has another engine; load it with infer_backend: huggingface.")
        return cls(chat_model.engine, config or {})

    @property
    def model(self) -> Any:
        return self.engine.model

    def set_generating(self, keys: Mapping[str, Any]) -> None:
        """Generate with LLaMA-Factory's defaults and these keys from now on."""
        from llamafactory.hparams import GeneratingArguments

        self.engine.generating_args = GeneratingArguments(**keys).to_dict()

    @property
    def tokenizer(self) -> Any:
        return self.engine.tokenizer

    @property
    def template(self) -> Any:
        return self.engine.template

    @cached_property
    def model_args(self) -> Any:
        """LLaMA-Factory's model arguments, parsed from ``config``."""
        return parse(dict(self.config))

    @cached_property
    def checkpoint(self) -> Path:
        """The local directory of the base model."""
        args = self.model_args
        path = Path(args.model_name_or_path).expanduser()
        if path.is_dir():
            return path
        from huggingface_hub import snapshot_download

        return Path(
            snapshot_download(str(path), revision=args.model_revision, cache_dir=args.cache_dir, local_files_only=True)
        )  # it has just been loaded from there

    @cached_property
    def adapters(self) -> AdapterSet:
        """The adapters that ``use_kt`` applies, opened anew from their files."""
        return open_configured(self.model_args)

    def encode(self, prompt: Prompt, **generating: Any) -> tuple[list[int], Any]:
        """(token ids, GenerationConfig) exactly as LLaMA-Factory's chat makes them."""
        engine = self.engine
        kwargs, _ = engine._process_args(
            engine.model, engine.tokenizer, engine.processor, engine.template, engine.generating_args,
            [dict(message) for message in prompt.messages], prompt.system or None, prompt.tools or None,
            input_kwargs=dict(generating),
        )  # fmt: skip
        return kwargs["inputs"][0].tolist(), kwargs["generation_config"]

    def encode_reference(self, prompt: Prompt) -> list[int]:
        """Token ids of the row's own answer, with the template's end, as training has them."""
        pair = [*prompt.messages, {"role": "assistant", "content": prompt.reference}]
        _, ids = self.template.encode_oneturn(self.tokenizer, pair, prompt.system or None, prompt.tools or None)
        return list(ids)
