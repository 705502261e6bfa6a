"""A chat loaded through LLaMA-Factory: its model, its template, its generating arguments."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..ground.errors import KTConfigError
from .prompts import Prompt

_PROCESS_ARGS = (
    "model", "tokenizer", "processor", "template", "generating_args", "messages", "system", "tools", "images", "videos",
    "audios", "input_kwargs",
)  # fmt: skip


@dataclass
class Chat:
    """What is needed to answer prompts; the engine of LLaMA-Factory's ``ChatModel`` for ``infer_backend: huggingface``."""

    engine: Any

    @classmethod
    def load(cls, config: Mapping[str, Any]) -> Chat:
        """Load a configuration as ``llamafactory-cli chat`` does, with or without ``use_kt``.

        Raises:
            KTConfigError: Another ``infer_backend``; with ``use_kt``, also what is wrong with the keys.
        """
        backend = config.get("infer_backend", "huggingface")
        if backend != "huggingface":
            raise KTConfigError(f"infer_backend: {backend} cannot be used here; use infer_backend: huggingface.")
        from . import bootstrap

        bootstrap.activate()
        from llamafactory.chat import ChatModel

        return cls.of(ChatModel(dict(config)))

    @classmethod
    def of(cls, chat_model: Any) -> Chat:
        """Use a ``ChatModel`` that is loaded already."""
        from llamafactory.chat.hf_engine import HuggingfaceEngine

        from .patching import expect

        expect(HuggingfaceEngine, "_process_args", _PROCESS_ARGS)  # type: ignore[arg-type]
        if not isinstance(chat_model.engine, HuggingfaceEngine):
            raise KTConfigError("The ChatModel has another engine; load it with infer_backend: huggingface.")
        return cls(chat_model.engine)

    @property
    def model(self) -> Any:
        return self.engine.model

    @property
    def tokenizer(self) -> Any:
        return self.engine.tokenizer

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
        _, ids = self.engine.template.encode_oneturn(self.tokenizer, pair, prompt.system or None, prompt.tools or None)
        return list(ids)
