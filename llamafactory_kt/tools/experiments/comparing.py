"""``llamafactory-kt compare``: the same prompts through several configurations, one model loaded at a time."""

from __future__ import annotations

import itertools
import multiprocessing
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from math import exp, log
from typing import Any

from ...ground.errors import KTError
from ...integration.prompts import Prompt
from .measuring import Measured, Options, run_group
from .plan import PARTS, Group, Variant, group_variants


def compare(variants: Sequence[Variant], prompts: list[Prompt], options: Options) -> dict[str, Any]:
    """Run all variants; the first is what the others are compared with.

    Each model gets a process of its own: kt-kernel gives memory back, and takes another number of threads, only then.

    Returns:
        What ``comparison.json`` holds.

    Raises:
        KTError: A configuration could not be loaded; nothing is reported then.
    """
    measured: dict[str, Measured] = {}
    with tempfile.TemporaryDirectory(prefix="llamafactory-kt-") as folder:
        for group in group_variants(variants):
            for result in _in_own_process(group, prompts, options, folder, variants[0].name):
                measured[result.name] = result
    return _report(variants, prompts, [measured[variant.name] for variant in variants], options)


def _in_own_process(
    group: Group, prompts: list[Prompt], options: Options, folder: str, reference: str
) -> list[Measured]:
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        try:
            return pool.submit(run_group, group, prompts, options, folder, reference).result()
        except BrokenProcessPool as error:
            names = ", ".join(variant.name for variant in group.variants)
            raise KTError(
                f"The process that ran {names} was killed, most likely for memory; see what it printed last."
            ) from error


def _report(
    variants: Sequence[Variant], prompts: list[Prompt], measured: list[Measured], options: Options
) -> dict[str, Any]:
    first = measured[0]
    entries = []
    for variant, result in zip(variants, measured, strict=True):
        rows = []
        for prompt, row, other in zip(prompts, result.rows, first.rows, strict=True):
            rows.append({
                **vars(row),
                "same_as_first": None if row.error or other.error else row.text == other.text,
                "exact_match": row.text.strip() == prompt.reference.strip() if prompt.reference and not row.error else None,
            })  # fmt: skip
        tokens = sum(row.answer_tokens for row in result.rows)
        entries.append({
            "name": variant.name, "part": PARTS[variant.part], "adapters": variant.adapters, "config": dict(variant.config),
            "load_seconds": result.load_seconds, "seconds": result.seconds, "answer_tokens": tokens,
            "tokens_per_second": tokens / result.seconds if result.seconds else None,
            "memory": result.memory, "gpu_memory": result.gpu_memory, "notes": result.notes, "mean": _means(rows),
            "rows": rows,
        })  # fmt: skip
    return {
        "first": first.name,
        "options": vars(options),
        "prompts": [{"index": p.index, "text": p.text, "reference": p.reference} for p in prompts],
        "warnings": _warnings(variants, measured),
        "variants": entries,
    }


def _means(rows: list[dict[str, Any]]) -> dict[str, float | None]:
    def mean(name: str) -> float | None:
        values = [float(row[name]) for row in rows if row[name] is not None]
        return sum(values) / len(values) if values else None

    means = {name: mean(name) for name in ("same_as_first", "exact_match", "kl", "top1")}
    known = [row for row in rows if row["perplexity"] is not None]
    tokens = sum(row["reference_tokens"] for row in known)
    loss = sum(log(row["perplexity"]) * row["reference_tokens"] for row in known)
    return {**means, "perplexity": exp(loss / tokens) if tokens else None}  # every token counts the same


def _warnings(variants: Sequence[Variant], measured: list[Measured]) -> list[str]:
    """Pairs that should differ, and give the same answers."""
    found = []
    for (earlier, one), (later, two) in itertools.combinations(zip(variants, measured, strict=True), 2):
        texts = [[row.text for row in each.rows if not row.error] for each in (one, two)]
        if _applied(earlier) == _applied(later) or texts[0] != texts[1] or not texts[0]:
            continue
        if earlier.config.get("adapter_name_or_path") == later.config.get("adapter_name_or_path"):
            why = ": what one of them has of the adapter and the other has not does not show in these answers."
        else:
            why = ", although their adapters differ. Is the adapter live, and do the prompts concern what it was trained on?"
        found.append(f"{earlier.name} and {later.name} give the same answers to all {len(texts[0])} prompts{why}")
    failed = sum(bool(row.error) for result in measured for row in result.rows)
    return [*found, *([f"{failed} answers failed; they are left out of the means."] if failed else [])]


def _applied(variant: Variant) -> tuple[list[str], str]:
    return variant.adapters, variant.part if variant.adapters else "off"
