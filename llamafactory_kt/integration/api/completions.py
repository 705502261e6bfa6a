"""A request to ``/v1/completions``: a text that the model goes on with, without the chat's template.

https://platform.openai.com/docs/api-reference/completions/create
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

from pydantic import Field, model_validator

from .sampling import Sampled

MOST_LOGPROBS = 5
"""likely tokens beside each one, as in OpenAI's API"""
REFUSED = {
    "best_of": "n says how many answers are made, and all are returned",
    "echo": "an answer is the text after the prompt alone",
    "suffix": "the model goes on with the prompt, and knows of no end",
}
"""OpenAI's fields that are not done here, and why"""

Prompt = Annotated[str, Field(min_length=1)]


class TextRequest(Sampled):
    """The body of a request."""

    source: ClassVar[str] = "prompt"

    prompt: Prompt | Annotated[list[Prompt], Field(min_length=1, max_length=1)]
    """one text; OpenAI's API takes several, and tokens"""
    logprobs: Annotated[int, Field(ge=0, le=MOST_LOGPROBS)] | None = None

    @model_validator(mode="before")
    @classmethod
    def _without_what_asks_for_nothing(cls, data: Any) -> Any:
        """What clients send for the defaults of fields that are refused."""
        if not isinstance(data, dict):
            return data
        defaults = {"best_of": data.get("n") or 1, "echo": False, "suffix": ""}
        return {key: value for key, value in data.items() if key not in defaults or value != defaults[key]}

    def noted(self) -> int | None:
        """How many likely tokens are reported beside each one; None: no probabilities."""
        return self.logprobs


def conversation(request: TextRequest) -> dict[str, Any]:
    """The prompt where an engine of LLaMA-Factory takes a conversation."""
    text = request.prompt if isinstance(request.prompt, str) else request.prompt[0]
    nothing = dict.fromkeys(("system", "tools", "images", "videos", "audios"))
    return {"messages": [{"role": "user", "content": text}], **nothing}
