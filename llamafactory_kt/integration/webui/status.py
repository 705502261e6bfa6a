"""What both pages say about the model that is loaded: a line above the conversation, and the heat map of its experts."""

from __future__ import annotations

import html
from pathlib import Path
from typing import Any

from ...model.state import has_kt_experts, kt_state
from .texts import MESSAGES, say

_STEADY = "<style>.kt-steady .html-container {opacity: 1 !important}</style>"
"""what waits for an answer's end, gradio would fade meanwhile"""
_PARTS = ("axes", "summary", "cell", "scale")


def status_line(model: Any, answer: Any, language: str | None) -> str:
    """HTML: the model, its adapters, the engine; and of the page's last answer its speed and how much of the context it takes."""
    if not has_kt_experts(model):
        return ""
    state = kt_state(model)
    names = [adapter.directory.name for adapter in (state.adapters.adapters or state.expert_adapters.adapters)]
    parts = [
        f"<b>{html.escape(Path(model_path(model)).name)}</b>",
        html.escape(say("adapters", language, names=" + ".join(names)) if names else say("no_adapter", language)),
        html.escape(say("engine", language, name=state.engine.name)),
    ]
    if answer is not None and answer.generation.prompt_tokens:
        at = answer.generation
        if at.tokens > 1 and not answer.running:
            parts.append(say("speed", language, speed=at.tokens_per_second))
        whole = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        parts.append(
            say("context" if whole else "context_used", language, used=at.prompt_tokens + at.tokens, whole=whole)
        )
    if answer is not None and answer.running:
        parts.append(say("answering", language))
    return f'{_STEADY}<span style="font-size:13px">{" · ".join(parts)}</span>'


def heat_map(model: Any, language: str | None) -> str:
    """HTML: how often the experts were used, or that nothing was counted yet; empty for a model that does not count."""
    from ...router_stats.stats import counts_experts, get_router_stats
    from ...router_stats.svg import heat_map_html

    if not has_kt_experts(model) or not counts_experts(model):
        return ""
    stats = get_router_stats(model)
    if not any(entry.tokens for entry in stats.values()):
        return f"<p>{say('uncounted', language)}</p>"
    return heat_map_html(
        stats, {part: MESSAGES[f"map_{part}"].get(language or "en", MESSAGES[f"map_{part}"]["en"]) for part in _PARTS}
    )


def model_path(model: Any) -> str:
    """What a model was loaded from; empty if nobody knows."""
    return str(getattr(getattr(model, "config", None), "_name_or_path", ""))
