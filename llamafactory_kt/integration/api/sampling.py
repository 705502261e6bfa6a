"""What requests to ``/v1/chat/completions`` and ``/v1/completions`` have in common: how to answer. Every field is done or refused by name.

https://platform.openai.com/docs/api-reference/chat/create
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field, JsonValue, model_validator

from ...decoding.choosing import Wishes
from ..sglang_engine import KTSGLangEngine

MOST_ANSWERS = 128
"""largest ``n``, as in OpenAI's API; without SGLang, all answers of a request are one batch in memory"""
MOST_STOPS, LONGEST_STOP = 64, 4096
"""stop strings, and characters of one, which is looked for at every token"""
LIMITS: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    # logits are divided by it in float32, where smaller ones give Inf
    ("temperature", lambda v: v == 0 or 1e-20 <= v <= 100, "0 or more, up to 100, and not closer to 0 than 1e-20"),
    ("top_p", lambda v: 0 <= v <= 1, "between 0 and 1"),
    ("top_k", lambda v: 0 <= v < 2**31, "0 (all tokens) or more, up to 2147483647"),
    ("presence_penalty", lambda v: -2 <= v <= 2, "between -2 and 2"),
    ("frequency_penalty", lambda v: -2 <= v <= 2, "between -2 and 2"),
    ("repetition_penalty", lambda v: 0.01 <= v <= 100, "between 0.01 and 100"),
    ("max_tokens", lambda v: 1 <= v < 2**31, "1 or more, up to 2147483647"),
    ("max_completion_tokens", lambda v: 1 <= v < 2**31, "1 or more, up to 2147483647"),
    ("seed", lambda v: -(2**63) <= v < 2**63, "a number of 64 bits"),
    ("top_logprobs", lambda v: 0 <= v <= 20, "between 0 and 20"),
    ("n", lambda v: 1 <= v <= MOST_ANSWERS, f"between 1 and {MOST_ANSWERS}"),
)
NEEDS_OUR_CHOICE = ("seed", "logit_bias", "logprobs", "response_format", "tool_choice")
"""what SGLang is not asked for, and several beams leave no room for"""

Stop = Annotated[str, Field(max_length=LONGEST_STOP)]


class StreamOptions(BaseModel):
    """What else a stream has."""

    model_config = ConfigDict(strict=True, extra="allow")

    include_usage: bool | None = None
    include_obfuscation: bool | None = None
    """OpenAI's padding against eavesdroppers; there is none here, and false asks for none"""


class Sampled(BaseModel):
    """The fields of a request that say how to answer."""

    model_config = ConfigDict(strict=True, extra="allow")
    source: ClassVar[str]
    """the field that says what to answer"""

    model: Annotated[str, Field(max_length=4096)]
    """the model or one of its adapters (:mod:`.models`); answers repeat it"""
    temperature: float | None = None
    top_p: float | None = None
    n: int = 1
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    seed: int | None = None
    max_tokens: int | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=MOST_STOPS, fail_fast=True)] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    # LLaMA-Factory's, which other servers have too
    do_sample: bool | None = None
    top_k: int | None = None
    repetition_penalty: float | None = None
    # they change no answer
    user: str | None = None
    metadata: dict[str, JsonValue] | None = None

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, data: Any) -> Any:
        """A field that is ``null`` has its default."""
        return {key: value for key, value in data.items() if value is not None} if isinstance(data, dict) else data

    def most_tokens(self) -> int | None:
        """The most that the answer may have."""
        return self.max_tokens

    def noted(self) -> int | None:
        """:attr:`Wishes.logprobs`."""
        raise NotImplementedError

    def sampling(self, engine: Any) -> dict[str, Any]:
        """How to answer, in LLaMA-Factory's words. OpenAI's ``top_p`` of 0 is the likeliest token, as is a temperature of 0."""
        temperature, top_p = self.temperature, self.top_p
        # several greedy answers are one for SGLang, while LLaMA-Factory samples them, and here a stream of them too
        in_server = isinstance(engine, KTSGLangEngine)
        sampled = self.n > 1 and not in_server
        if 0 in (temperature, top_p):
            temperature, top_p = (1.0, 0.0) if sampled else (0.0, None)
        penalties = {"presence_penalty": self.presence_penalty, "frequency_penalty": self.frequency_penalty}
        return {
            # a request's temperature is not ignored because the YAML has do_sample: false
            "do_sample": sampled
            or (self.do_sample if self.do_sample is not None else bool(temperature or top_p) or None),
            "temperature": temperature,
            "top_p": top_p,
            "top_k": self.top_k,
            "max_new_tokens": self.most_tokens(),
            "repetition_penalty": self.repetition_penalty,
            "stop": self.stop,
            **(penalties if in_server else {}),
        }

    def wishes(self) -> Wishes:
        """What only our own choice of tokens can do."""
        return Wishes(
            seed=self.seed,
            presence_penalty=self.presence_penalty or 0.0,
            frequency_penalty=self.frequency_penalty or 0.0,
            logit_bias={int(token): bias for token, bias in (self.logit_bias or {}).items()},
            logprobs=self.noted(),
        )

    def asks_for(self, name: str) -> bool:
        """Whether one of :data:`NEEDS_OUR_CHOICE` is asked for."""
        value = getattr(self, name, None)
        return value is not None and value is not False and value != {}


def problems(request: Sampled, engine: Any, refused: dict[str, str]) -> Iterator[tuple[str, str]]:
    """(field, what is wrong with it) for everything that is wrong with how to answer.

    Args:
        refused: OpenAI's fields that are not done here, and why.
    """
    for name, valid, wanted in LIMITS:
        if (value := getattr(request, name, None)) is not None and not valid(value):
            yield name, f"{name}: {value} is not {wanted}."
    for name in [*(request.model_extra or {})][:5]:
        shown = name[:100]
        yield shown, f"{shown}: {refused.get(name, 'there is no such field here')}."
    options = request.stream_options
    if options and not request.stream:
        yield "stream_options", "stream_options: only a stream has them."
    if options and (options.include_obfuscation or options.model_extra):
        yield "stream_options", "stream_options: include_usage is the only one here."
    size = vocabulary_size(engine) if request.logit_bias else 0
    for token, bias in (request.logit_bias or {}).items():
        if not (token.isascii() and token.isdecimal() and len(token) < 10 and int(token) < size):
            yield "logit_bias", f"logit_bias: {token[:100]} is not a token's number, which is below {size}."
            break
        if not -100 <= bias <= 100:
            yield "logit_bias", f"logit_bias: {bias} is not between -100 and 100."
            break
    ours = [name for name in NEEDS_OUR_CHOICE if request.asks_for(name)]
    if isinstance(engine, KTSGLangEngine):
        for name in ours:
            yield name, f"{name} cannot be asked for with infer_backend: sglang and use_kt."
        return
    if request.presence_penalty or request.frequency_penalty:
        ours.append("presence_penalty" if request.presence_penalty else "frequency_penalty")
    if ours and ((engine.generating_args or {}).get("num_beams") or 1) > 1:
        yield ours[0], f"{ours[0]} cannot be asked for while the server's configuration sets num_beams above 1."


def vocabulary_size(engine: Any) -> int:
    """The number of a model's logits."""
    if isinstance(engine, KTSGLangEngine):
        return len(engine.tokenizer)
    return int(engine.model.config.get_text_config().vocab_size)
