"""``llamafactory.chat.sglang_engine``: with use_kt, the server and the client are ours.

The stock engine splits its command on blanks, runs PATH's python3, names the adapter in a field that SGLang does not have
(``lora_request``, so the base model answers), and blocks the event loop while an answer streams. Without use_kt it stays in
place. The client uses ``/generate`` of sglang-kt 0.7.2.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from types import ModuleType
from typing import Any

import httpx

from ..ground.errors import KTConfigError, KTServerError
from .patching import expect, replace

logger = logging.getLogger("llamafactory_kt")

_UNUSABLE = ("--stream-output", "--skip-tokenizer-init", "--api-key", "--ssl-certfile")
"""options that change the server's protocol"""


def patch(module: ModuleType) -> None:
    """Let ``SGLangEngine(...)`` build our engine if use_kt is set."""
    stock = expect(module, "SGLangEngine")
    expect(stock, "_cleanup_server")
    expect(module, "load_tokenizer")
    expect(module, "get_template_and_fix_tokenizer")
    ours: Any = type("KTSGLangEngine", (KTSGLangEngine, stock), {"__doc__": KTSGLangEngine.__doc__, "_stock": module})

    def SGLangEngine(model_args: Any, *others: Any, **named: Any) -> Any:
        engine = ours if getattr(model_args, "kt_inference", False) else stock
        return engine(model_args, *others, **named)

    replace(module, SGLangEngine)


class KTSGLangEngine:
    """LLaMA-Factory's engine for one SGLang server with KT; handles many requests at once."""

    _stock: Any
    """the hooked module"""

    def __init__(self, model_args: Any, data_args: Any, finetuning_args: Any, generating_args: Any):
        from ..serving.command import server_command
        from ..serving.options import discover
        from ..serving.server import start_server

        self.name = self._stock.EngineName.SGLANG
        self.can_generate = finetuning_args.stage == "sft"
        loaded = self._stock.load_tokenizer(model_args)
        self.tokenizer, self.processor = loaded["tokenizer"], loaded["processor"]
        self.tokenizer.padding_side = "left"
        self.template = self._stock.get_template_and_fix_tokenizer(self.tokenizer, data_args)
        self.generating_args = generating_args.to_dict()
        self.kt_show_stats = model_args.kt_stats

        options = discover(model_args.kt_sglang_python)
        logger.info("SGLang is %s, run by %s", options.version, options.python)
        command = server_command(model_args, options, ["--log-level", "info" if model_args.kt_debug else "error"])
        if unusable := [flag for flag in _UNUSABLE if options.value(command.parsed, flag)]:
            raise KTConfigError(
                f"sglang_config: {', '.join(unusable)} cannot be set in a chat, which talks to a server of its own; "
                "llamafactory-kt serve can have it."
            )
        for notice in command.notices:
            logger.warning("%s", notice)
        self._lora = command.adapter.name
        self.context_length: int = command.parsed.context_length
        logger.info("SGLang's command:\n%s", command)
        self._server = start_server(command, model_args.kt_sglang_timeout)
        logger.info("SGLang is ready")
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
        timeout = httpx.Timeout(None, connect=30)
        self._client = httpx.AsyncClient(base_url=self._server.url, timeout=timeout, limits=limits, trust_env=False)

    async def chat(self, messages: Sequence[dict[str, str]], *args: Any, **kwargs: Any) -> list[Any]:
        """``num_return_sequences`` whole answers, each a ``Response`` of LLaMA-Factory.

        Raises:
            KTServerError: The server is gone, refused the request, or broke the answer off.
        """
        count = kwargs.pop("num_return_sequences", None) or 1
        return await asyncio.gather(*(self._answer(messages, *args, **kwargs) for _ in range(count)))

    async def _answer(self, *args: Any, **kwargs: Any) -> Any:
        last: dict[str, Any] = {}
        async for chunk in self._generate(*args, **kwargs):
            last = chunk
        if not last:
            raise KTServerError("SGLang ended the answer without a word.")
        meta = last["meta_info"]
        return self._stock.Response(
            response_text=last["text"],
            response_length=meta["completion_tokens"],
            prompt_length=meta["prompt_tokens"],
            finish_reason=_finish_reason(meta),
        )

    async def stream_chat(
        self, messages: Sequence[dict[str, str]], *args: Any, kt_generation: Any = None, **kwargs: Any
    ) -> AsyncGenerator[str, None]:
        """The answer piece by piece; the server stops generating when the reader is gone.

        Args:
            messages: the conversation.
            args, kwargs: as LLaMA-Factory passes them.
            kt_generation: the :class:`~llamafactory_kt.integration.generation.Generation` that measures and can stop the answer.

        Raises:
            KTServerError: The server is gone, refused the request, or broke the answer off.
        """
        from .generation import Generation

        generation, shown = kt_generation or Generation(), 0
        generation.begin(self.tokenizer, 0, ())
        async with aclosing(self._generate(messages, *args, **kwargs)) as chunks:
            async for chunk in chunks:
                meta = chunk["meta_info"]
                generation.prompt_tokens = meta["prompt_tokens"]
                generation.cached_tokens = meta.get("cached_tokens", 0)
                generation.count(meta["completion_tokens"])
                generation.finish_reason = _finish_reason(meta)
                yield chunk["text"][shown:]
                shown = len(chunk["text"])
                if generation.stopped:
                    generation.finish_reason = "stop"
                    return

    async def _generate(
        self,
        messages: Sequence[dict[str, str]],
        system: str | None = None,
        tools: str | None = None,
        images: Any = None,
        videos: Any = None,
        audios: Any = None,
        **asked: Any,
    ) -> AsyncGenerator[dict[str, Any], None]:
        """SGLang's chunks; each has the whole text so far."""
        if images or videos or audios:
            raise NotImplementedError("Images, videos and audios do not work with infer_backend: sglang and use_kt.")
        paired = [*messages, {"role": "assistant", "content": ""}]
        prompt, _ = self.template.encode_oneturn(self.tokenizer, paired, system, tools)
        request = {"input_ids": prompt, "sampling_params": self._sampling(len(prompt), asked), "stream": True}
        if self._lora:
            request["lora_path"] = self._lora
        try:
            async with self._client.stream("POST", "/generate", json=request) as response:
                if response.status_code != 200:
                    text = (await response.aread()).decode(errors="replace")
                    raise KTServerError(f"SGLang refused the request ({response.status_code}): {text}")
                async for line in response.aiter_lines():
                    if not line.startswith("data:") or (data := line[5:].strip()) == "[DONE]":
                        continue
                    chunk: dict[str, Any] = json.loads(data)
                    if "error" in chunk:
                        raise KTServerError(f"SGLang broke the answer off: {chunk['error']}")
                    yield chunk
        except httpx.HTTPError as error:
            await asyncio.to_thread(self._server.check)
            raise KTServerError(f"SGLang at {self._server.url} did not answer: {error!r}.") from error

    def _sampling(self, prompt_length: int, asked: dict[str, Any]) -> dict[str, Any]:
        """SGLang's sampling parameters: those of the request, else those of the configuration."""
        defaults = self.generating_args

        def choose(name: str) -> Any:
            return asked[name] if asked.get(name) is not None else defaults.get(name)

        greedy = choose("do_sample") is False and asked.get("temperature") is None
        return {
            "temperature": 0.0 if greedy else choose("temperature"),
            "top_p": choose("top_p") or 1.0,  # SGLang refuses 0
            "top_k": choose("top_k") or -1,
            "repetition_penalty": choose("repetition_penalty") or 1.0,
            "presence_penalty": asked.get("presence_penalty") or 0.0,
            "frequency_penalty": asked.get("frequency_penalty") or 0.0,
            "max_new_tokens": _max_new_tokens(asked, prompt_length) or _max_new_tokens(defaults, prompt_length),
            "stop": asked.get("stop"),
            "stop_token_ids": self.template.get_stop_token_ids(self.tokenizer),
            "skip_special_tokens": choose("skip_special_tokens"),
            **({"sampling_seed": asked["seed"]} if asked.get("seed") is not None else {}),
        }

    def _cleanup_server(self) -> None:
        """Called by the stock class when the engine is deleted, and at exit."""
        if server := getattr(self, "_server", None):
            server.close()


def _max_new_tokens(source: dict[str, Any], prompt_length: int) -> int | None:
    if source.get("max_new_tokens"):
        return int(source["max_new_tokens"])
    return max(1, source["max_length"] - prompt_length) if source.get("max_length") else None


def _finish_reason(meta: dict[str, Any]) -> str:
    """``stop`` or ``length``. SGLang sends ``{"type": "stop", ...}``; older servers send the word alone."""
    reason = meta.get("finish_reason")
    return "stop" if (reason.get("type") if isinstance(reason, dict) else reason) == "stop" else "length"
