"""The report of a comparison as one file of HTML that needs no other, and no network."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...ground.machine import gib
from ...router_stats.plots import bars, data_uri


@dataclass(frozen=True)
class _Column:
    key: str
    title: str
    help: str
    read: Callable[[dict[str, Any]], Any]
    form: Callable[[Any], str]

    def show(self, variant: dict[str, Any]) -> str:
        value = self.read(variant)
        return "-" if value is None else self.form(value)


def _mean(key: str) -> Callable[[dict[str, Any]], Any]:
    return lambda variant: variant["mean"][key]


COLUMNS = (
    _Column("same_as_first", "same answers", "share of answers equal to the first configuration's", _mean("same_as_first"), "{:.1%}".format),
    _Column("kl", "KL", "mean divergence of the next-token distributions from the first configuration's, along its answers, in nats a token", _mean("kl"), "{:.4g}".format),
    _Column("top1", "top-1 agreement", "share of those tokens where both find the same token the likeliest", _mean("top1"), "{:.1%}".format),
    _Column("exact_match", "exact match", "share of answers equal to the prompts' own", _mean("exact_match"), "{:.1%}".format),
    _Column("perplexity", "perplexity", "of the prompts' own answers, over all their tokens", _mean("perplexity"), "{:.4g}".format),
    _Column("tokens_per_second", "tokens/s", "generated in batches, prompts included", lambda v: v["tokens_per_second"], "{:.1f}".format),
    _Column("load_seconds", "ready after", "seconds to load the model, or to exchange the adapter of a loaded one", lambda v: v["load_seconds"], "{:.1f} s".format),
    _Column("memory", "memory", "resident memory of the process after the answers; variants of one model share a process", lambda v: v["memory"], gib),
    _Column("gpu_memory", "GPU memory", "the most that torch had allocated", lambda v: v["gpu_memory"] or None, gib),
)  # fmt: skip


def shown_columns(data: dict[str, Any]) -> list[_Column]:
    """Columns for which any variant has a value."""
    return [column for column in COLUMNS if any(column.read(variant) is not None for variant in data["variants"])]


def write_report(data: dict[str, Any], path: Path) -> None:
    """Write what :func:`~llamafactory_kt.tools.experiments.comparing.compare` returned."""
    from jinja2 import Environment, PackageLoader
    from markupsafe import Markup

    environment = Environment(loader=PackageLoader("llamafactory_kt.tools.experiments", "."), autoescape=True)
    # "</script>" inside a text must not end the element
    embedded = json.dumps(data, ensure_ascii=False, default=str).replace("<", "\\u003c")
    page = environment.get_template("report.html.jinja").render(
        data=data, columns=shown_columns(data), plots=_plots(data), differences=_differences(data), facts=_facts,
        embedded=Markup(embedded),
    )  # fmt: skip
    path.write_text(page, encoding="utf-8")


def _plots(data: dict[str, Any]) -> dict[str, str]:
    """Bars of every measure that differs between variants."""
    found = {}
    for column in shown_columns(data):
        known = [(v["name"], column.read(v)) for v in data["variants"] if column.read(v) is not None]
        if column.key in ("kl", "top1", "perplexity", "tokens_per_second") and len({value for _, value in known}) > 1:
            names, values = zip(*known, strict=True)
            figure = bars(names, {column.title: values}, column.title)
            found[column.title] = data_uri(figure)
    return found


def _differences(data: dict[str, Any]) -> dict[str, list[str]]:
    configs = [variant["config"] for variant in data["variants"]]
    keys = dict.fromkeys(key for config in configs for key in config)
    rows = {key: [str(config.get(key, "")) for config in configs] for key in keys}
    return {key: values for key, values in rows.items() if len(set(values)) > 1}


def _facts(row: dict[str, Any]) -> str:
    parts = [f"{row['answer_tokens']} tokens"] if not row["error"] else []
    for key, form in (("kl", "KL {:.4g}"), ("top1", "top-1 {:.0%}"), ("perplexity", "perplexity {:.4g}")):
        if row[key] is not None:
            parts.append(form.format(row[key]))
    return ", ".join(parts)
