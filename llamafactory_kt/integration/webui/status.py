"""What both pages say about the model that is loaded: a line above the conversation, and the heat map of its experts."""

from __future__ import annotations

import html
from pathlib import Path
from typing import Any

from ...model.state import has_kt_experts, kt_state
from .texts import MESSAGES, say

_STYLE = """<style>
.kt-steady .html-container, .kt-steady .prose {opacity: 1 !important}
.kt-query textarea {field-sizing: content; height: auto !important; min-height: 84px; max-height: 40vh; overflow-y: auto !important}
.kt-query textarea::placeholder {color: color-mix(in srgb, currentcolor 60%, transparent) !important}
.form:has(> .kt-query) {order: -2}
.kt-submit {order: -1}
.kt-chat [data-testid=block-label] {display: none !important}
.kt-table :is(table, tr, th, td) {border-color: var(--border-color-primary) !important}
.kt-table :is(th, td:first-child) {white-space: nowrap}
</style>"""
"""For a model of ours alone. What waits for an answer's end, gradio would fade meanwhile. A field of one line, which gradio sends on Enter, shall
look like more, grow with its text, and shrink when that has been sent. It stands next to the conversation, before role, system prompt and tools.
"Chatbot", in every language, would cover the conversation. The load table's names would be broken in mid-word on a narrow page."""
_PARTS = ("axes", "point", "cell", "scale")


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
    if answer is not None and answer.generation.prompt_tokens and not answer.taken_back:
        at = answer.generation
        if at.tokens > 1 and not answer.running:
            parts.append(say("speed", language, speed=at.tokens_per_second))
        used = at.prompt_tokens + at.tokens
        whole = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        name = "context_used" if not whole else "context" if used <= whole else "context_over"
        parts.append(say(name, language, used=used, whole=whole))
    if answer is not None and answer.running:
        parts.append(say("in_line_short" if answer.ahead else "answering", language))
    return f'{_STYLE}<span style="font-size:13px">{" · ".join(parts)}</span>'


def heat_map(model: Any, answer: Any, language: str | None) -> str:
    """HTML: how often the experts were used in a page's conversation, or that nothing was counted in it yet; empty for a model that does not
    count."""
    from ...router_stats.stats import counts_experts, get_router_stats
    from ...router_stats.svg import heat_map_html

    if not has_kt_experts(model) or not counts_experts(model):
        return ""
    total = next(iter(get_router_stats(model).values())).tokens
    counted = answer.counted if answer is not None else {}
    first = next(iter(counted.values()), None)
    if first is None or not first.tokens:
        return f"<p>{say('uncounted', language)}{say('map_total', language, total=total) if total else ''}</p>"
    summary = say("map_summary", language, tokens=first.tokens, answers=first.tokens - first.prompt_tokens)
    texts = {part: MESSAGES[f"map_{part}"].get(language or "en", MESSAGES[f"map_{part}"]["en"]) for part in _PARTS}
    return f"<p>{summary}{say('map_total', language, total=total)}</p>{heat_map_html(counted, texts)}"


def model_path(model: Any) -> str:
    """What a model was loaded from; empty if nobody knows."""
    return str(getattr(getattr(model, "config", None), "_name_or_path", ""))


def is_gone(chatter: Any) -> bool:
    """Whether a model of ours was loaded last, and has been unloaded."""
    return not chatter.loaded and bool(getattr(chatter, "_kt_unloaded", False))
