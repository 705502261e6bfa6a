"""The report of a comparison: one self-contained HTML file, and its summary as Markdown."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
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
    form: Callable[[Any], str]

    def read(self, variant: dict[str, Any]) -> Any:
        """The variant's value, or None."""
        value = variant["mean"][self.key] if self.key in variant["mean"] else variant[self.key]
        return None if self.key == "gpu_memory" and not value else value

    def show(self, variant: dict[str, Any]) -> str:
        value = self.read(variant)
        return "-" if value is None else self.form(value)


COLUMNS = (
    _Column("same_as_first", "same answers", "share of answers equal to the first configuration's", "{:.1%}".format),
    _Column("kl", "KL", "mean divergence of the next-token distributions from the first configuration's, along its answers, in nats per token", "{:.4g}".format),
    _Column("top1", "top-1 agreement", "share of those tokens for which both have the same most likely token", "{:.1%}".format),
    _Column("exact_match", "exact match", "share of answers equal to the prompts' own", "{:.1%}".format),
    _Column("perplexity", "perplexity", "of the prompts' own answers, over all their tokens", "{:.4g}".format),
    _Column("tokens_per_second", "tokens/s", "generated in batches, including prefill", "{:.1f}".format),
    _Column("load_seconds", "ready after", "seconds to load the model, or to exchange the adapter of a loaded one", "{:.1f} s".format),
    _Column("memory", "memory", "resident memory of the process after the answers; variants of one model share a process", gib),
    _Column("gpu_memory", "GPU memory", "peak memory that torch allocated on GPUs", gib),
)  # fmt: skip


def shown_columns(data: dict[str, Any]) -> list[_Column]:
    """The columns for which any variant has a value."""
    return [column for column in COLUMNS if any(column.read(variant) is not None for variant in data["variants"])]


def write_report(data: dict[str, Any], path: Path) -> None:
    """Write the result of :func:`~llamafactory_kt.tools.experiments.comparing.compare_variants` as HTML."""
    from jinja2 import Environment, PackageLoader
    from markupsafe import Markup

    environment = Environment(loader=PackageLoader("llamafactory_kt.tools.experiments", "."), autoescape=True)
    # "</script>" inside a text must not end the element
    embedded = json.dumps(data, ensure_ascii=False, default=str).replace("<", "\\u003c")
    page = environment.get_template("report.html.jinja").render(
        data=data, columns=shown_columns(data), plots=_plots(data), differences=_differences(data), facts=_facts,
        embedded=Markup(embedded), about=facts_about(data),
    )  # fmt: skip
    path.write_text(page, encoding="utf-8")


def facts_about(data: dict[str, Any]) -> dict[str, str]:
    """What was compared, with what, where and when: title -> text."""
    about = data["about"]
    return {
        "Model": ", ".join(about["models"]),
        "Adapters": ", ".join(about["adapters"]) or "none",
        "Versions": ", ".join(f"{name} {number}" for name, number in about["versions"].items()),
        "Machine": about["machine"],
        "Created": about["created"],
    }


def markdown(data: dict[str, Any]) -> str:
    """The facts, the warnings and the summary, for an issue or a wiki."""

    def row(cells: Iterable[str]) -> str:
        return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"

    columns = shown_columns(data)
    lines = ["# Comparison", "", *(f"- {title}: {text}" for title, text in facts_about(data).items()), ""]
    lines += [f"**{warning}**\n" for warning in data["warnings"]]
    lines += [row(["configuration", *(column.title for column in columns)]), row(["---", *["---:"] * len(columns)])]
    lines += [row([variant["name"], *(column.show(variant) for column in columns)]) for variant in data["variants"]]
    return "\n".join([*lines, "", *(f"{column.title}: {column.help}.  " for column in columns)]) + "\n"


def _plots(data: dict[str, Any]) -> dict[str, str]:
    """Title -> bar plot of each measure that differs between variants."""
    found = {}
    for column in shown_columns(data):
        known = {v["name"]: column.read(v) for v in data["variants"] if column.read(v) is not None}
        if column.key in ("kl", "top1", "perplexity", "tokens_per_second") and len(set(known.values())) > 1:
            found[column.title] = data_uri(bars(list(known), list(known.values()), column.title))
    return found


def _differences(data: dict[str, Any]) -> dict[str, list[str]]:
    """Key -> its value in each configuration, for the keys that differ."""
    configs = [variant["config"] for variant in data["variants"]]
    rows = {key: [str(config.get(key, "")) for config in configs] for config in configs for key in config}
    return {key: values for key, values in rows.items() if len(set(values)) > 1}


def _facts(row: dict[str, Any]) -> str:
    parts = [f"{row['answer_tokens']} tokens"] if not row["error"] else []
    for key, form in (("kl", "KL {:.4g}"), ("top1", "top-1 {:.0%}"), ("perplexity", "perplexity {:.4g}")):
        if row[key] is not None:
            parts.append(form.format(row[key]))
    return ", ".join(parts)
