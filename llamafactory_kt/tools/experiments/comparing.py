"""``llamafactory-kt compare``: the same prompts through several configurations, one model loaded at a time."""

from __future__ import annotations

import itertools
import multiprocessing
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from datetime import UTC, datetime
from importlib.metadata import distributions, version
from math import exp, log
from statistics import fmean
from typing import Any

from ...ground.atomic_output import temporary_directory
from ...ground.errors import KTError
from ...ground.machine import cpu_name, usable_cores
from ...integration.prompts import Prompt
from .measuring import CompareOptions, VariantResult, run_group
from .plan import PARTS, Variant, group_variants

DISTRIBUTIONS = ("llamafactory-kt-experts", "llamafactory", "transformers", "peft", "torch", "kt-kernel")
"""whose versions a report names, where they are installed"""
FILE = "comparison.json"
"""by which the directory of an earlier run is known"""


def compare_variants(variants: Sequence[Variant], prompts: list[Prompt], options: CompareOptions) -> dict[str, Any]:
    """Run all variants; the first is the reference.

    Each model gets its own process: only the end of a process frees kt-kernel's memory and lets it take another number
    of threads.

    Returns:
        The content of :data:`FILE`.

    Raises:
        KTError: A configuration could not be loaded.
    """
    results: dict[str, VariantResult] = {}
    spawn = multiprocessing.get_context("spawn")
    with temporary_directory("llamafactory-kt-compare-") as folder:
        for group in group_variants(variants):
            with ProcessPoolExecutor(1, mp_context=spawn) as pool:
                try:
                    found = pool.submit(run_group, group, prompts, options, str(folder), variants[0].name).result()
                except BrokenProcessPool as error:
                    names = ", ".join(variant.name for variant in group)
                    raise KTError(
                        f"The process that ran {names} was killed, most likely for memory; see what it printed last."
                    ) from error
            results |= {result.name: result for result in found}
    return _report(variants, prompts, [results[variant.name] for variant in variants], options)


def _report(
    variants: Sequence[Variant], prompts: list[Prompt], results: list[VariantResult], options: CompareOptions
) -> dict[str, Any]:
    first = results[0]
    entries = []
    for variant, result in zip(variants, results, strict=True):
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
        "about": about(variants),
        "first": first.name,
        "options": vars(options),
        "prompts": [{"index": p.index, "text": p.text, "reference": p.reference} for p in prompts],
        "warnings": warnings_about(variants, results),
        "variants": entries,
    }


def about(variants: Sequence[Variant]) -> dict[str, Any]:
    """What a report has to name, so that it can be read later: models, adapters, versions, the machine and the time."""
    models = [str(variant.config.get("model_name_or_path")) for variant in variants]
    return {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "models": list(dict.fromkeys(models)),
        "adapters": list(dict.fromkeys(name for variant in variants for name in variant.adapters)),
        "versions": {name: version(name) for name in DISTRIBUTIONS if name in _installed()},
        "machine": f"{cpu_name()}, {usable_cores()} cores",
    }


def _installed() -> set[str]:
    return {str(found.metadata["Name"]).lower() for found in distributions()}


def _means(rows: list[dict[str, Any]]) -> dict[str, float | None]:
    means: dict[str, float | None] = {}
    for name in ("same_as_first", "exact_match", "kl", "top1"):
        values = [row[name] for row in rows if row[name] is not None]
        means[name] = fmean(values) if values else None
    known = [row for row in rows if row["perplexity"] is not None]
    tokens = sum(row["reference_tokens"] for row in known)
    loss = sum(log(row["perplexity"]) * row["reference_tokens"] for row in known)
    return {**means, "perplexity": exp(loss / tokens) if tokens else None}  # every token has the same weight


def warnings_about(variants: Sequence[Variant], results: list[VariantResult]) -> list[str]:
    """Name pairs of variants that should differ but give the same answers, and count failed answers."""
    found = []
    for (earlier, one), (later, two) in itertools.combinations(zip(variants, results, strict=True), 2):
        texts = [[row.text for row in each.rows if not row.error] for each in (one, two)]
        if earlier.applied == later.applied or texts[0] != texts[1] or not texts[0]:
            continue
        if earlier.config.get("adapter_name_or_path") == later.config.get("adapter_name_or_path"):
            why = ": the part of the adapter that only one of them has does not change these answers."
        else:
            why = ", although their adapters differ. Is the adapter live, and do the prompts concern what it was trained on?"
        found.append(f"{earlier.name} and {later.name} give the same answers to all {len(texts[0])} prompts{why}")
    failed = sum(bool(row.error) for result in results for row in result.rows)
    return [*found, *([f"{failed} answers failed; they are left out of the means."] if failed else [])]
