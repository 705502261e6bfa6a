"""``llamafactory-kt stats``: the experts that a set of prompts uses, in total and by a field of the prompts."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ...ground.atomic_output import replacing
from ...ground.errors import KTConfigError, KTDataError, name_some
from ...integration.chat import LoadedChat
from ...integration.prompts import Prompt
from ...model.state import kt_state
from ...router_stats.plots import router_heat_map, save
from ...router_stats.stats import LayerStats, get_router_stats, reset_router_stats
from .generating import Answer, answer_all

Stats = dict[int, LayerStats]
FILE = "stats.json"
"""by which the directory of an earlier run is known"""


@dataclass
class ExpertUsage:
    """The router statistics of a set of prompts."""

    prompts: int
    failed: list[Answer]
    total: Stats
    groups: dict[str, Stats]
    """by the field's value, in order of first appearance; empty without a field"""
    norms: dict[int, list[float]]
    """layer -> ‖ΔW‖ of the adapter per expert; empty without an adapter"""
    num_layers: int

    def correlation(self, layer: int) -> float | None:
        """Pearson's correlation between the tokens and ‖ΔW‖ of a layer's experts; None if either is constant."""
        pair = np.array([self.total[layer].counts, self.norms.get(layer, [0.0] * len(self.total[layer].counts))])
        if not pair.std(axis=1).all():
            return None
        return float(np.corrcoef(pair)[0, 1])

    def to_dict(self) -> dict[str, Any]:
        def layers(stats: Stats) -> list[dict[str, Any]]:
            return [entry.to_dict() for entry in stats.values()]

        return {
            "prompts": self.prompts,
            "failed": [{"index": answer.index, "error": answer.error} for answer in self.failed],
            "layers": layers(self.total),
            "groups": {name: layers(stats) for name, stats in self.groups.items()},
            "adapter": [
                {"layer": layer, "norms": norms, "correlation": self.correlation(layer)}
                for layer, norms in self.norms.items()
            ],
        }


def split_prompts(prompts: list[Prompt], field: str | None) -> dict[str, list[Prompt]]:
    """Group prompts by a field of their rows; without a field, all are under ``""``.

    Raises:
        KTDataError: A row has no such field.
    """
    if field is None:
        return {"": prompts}
    if missing := [prompt.index for prompt in prompts if not prompt.problem and field not in prompt.row]:
        raise KTDataError(f"rows {name_some(missing)} have no field {field!r} to split by (rows are counted from 0).")
    groups: dict[str, list[Prompt]] = {}
    for prompt in prompts:
        groups.setdefault(str(prompt.row.get(field, "")), []).append(prompt)
    return groups


def count_usage(
    config: Mapping[str, Any], prompts: list[Prompt], field: str | None = None, batch_size: int = 8,
    progress: Callable[[int], Any] = lambda done: None, *, seed: int | None = None,
) -> ExpertUsage:  # fmt: skip
    """Answer all prompts with a configuration, and count what its routers choose.

    Args:
        progress: called with the number of prompts of each batch.

    Raises:
        KTConfigError: The configuration does not use KT experts, or is wrong.
        KTDataError: A row lacks the field, or no prompt could be answered.
    """
    groups = split_prompts(prompts, field)
    if config.get("use_kt") is not True:
        raise KTConfigError("Only KT experts are counted; the configuration needs use_kt: true.")
    chat = LoadedChat.load({**config, "kt_router_stats": True})
    failed: list[Answer] = []
    parts: dict[str, Stats] = {}
    for name, members in groups.items():
        reset_router_stats(chat.model)
        for batch in answer_all(chat, members, batch_size=batch_size, seed=seed):
            failed += [answer for answer in batch if answer.error]
            progress(len(batch))
        parts[name] = get_router_stats(chat.model)
    if len(failed) == len(prompts):
        raise KTDataError(
            f"none of the {len(prompts)} prompts could be answered; the first error is: {failed[0].error}"
        )
    state, norms = kt_state(chat.model), {}
    for wrapper in state.wrappers:
        if lora := state.expert_adapters.read_layer(wrapper.layer_idx, wrapper.info.shape):
            norms[wrapper.layer_idx] = lora.norms().tolist()
    total = {layer: _sum([stats[layer] for stats in parts.values()]) for layer in next(iter(parts.values()))}
    layers = chat.model.config.get_text_config().num_hidden_layers
    return ExpertUsage(len(prompts), failed, total, parts if field else {}, norms, layers)


def _sum(parts: list[LayerStats]) -> LayerStats:
    arrays = ("prompt_counts", "answer_counts", "prompt_weights", "answer_weights")
    return LayerStats(
        parts[0].layer, sum(part.tokens for part in parts), sum(part.prompt_tokens for part in parts),
        *(np.sum([getattr(part, name) for part in parts], axis=0) for name in arrays),
    )  # fmt: skip


def write_usage(usage: ExpertUsage, output: Path, title: str, *, overwrite: bool = False) -> None:
    """Write ``stats.json``, ``stats.csv``, heat maps of all prompts and of each group, and ``experts_frequency.pt``.

    Raises:
        KTAdapterError: The directory is not empty, or, with ``overwrite``, holds something else.
    """
    with replacing(output, FILE if overwrite else None) as folder:
        folder.mkdir()
        (folder / FILE).write_text(json.dumps(usage.to_dict(), ensure_ascii=False, indent=1), encoding="utf-8")
        _write_csv(usage, folder / "stats.csv")
        save(router_heat_map(usage.total, title), folder / "experts.png")
        if usage.norms:
            save(router_heat_map(usage.total, f"{title}, with its adapter", usage.norms), folder / "experts_lora.png")
        for number, (name, stats) in enumerate(usage.groups.items()):
            slug = re.sub(r"[^\w-]+", "_", name)[:40]
            save(router_heat_map(stats, f"{title}: {name}"), folder / f"experts_{number}_{slug}.png")
        _write_frequency(usage, folder / "experts_frequency.pt")


def _write_csv(usage: ExpertUsage, path: Path) -> None:
    columns = ("group", "layer", "expert", "prompt_tokens", "answer_tokens", "prompt_weight", "answer_weight", "balance", "lora_norm")  # fmt: skip
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(columns)
        for group, stats in {"": usage.total, **usage.groups}.items():
            for layer, entry in stats.items():
                norms = usage.norms.get(layer)
                for expert, balance in enumerate(entry.balance):
                    writer.writerow([
                        group, layer, expert, entry.prompt_counts[expert], entry.answer_counts[expert],
                        f"{entry.prompt_weights[expert]:.6g}", f"{entry.answer_weights[expert]:.6g}", f"{balance:.6g}",
                        f"{norms[expert]:.6g}" if norms else "",
                    ])  # fmt: skip


def _write_frequency(usage: ExpertUsage, path: Path) -> None:
    """Write what sglang-kt 0.7.2 reads with ``--kt-expert-placement-strategy frequency --init-expert-location FILE.pt``:
    ``{"logical_count": int64 [1, num_layers, num_experts]}``, zero for dense layers (``kt_ep_wrapper.py``)."""
    import torch

    sizes = {len(entry.counts) for entry in usage.total.values()}
    if len(sizes) > 1:  # SGLang's tensor has the same size for all layers
        return
    counts = torch.zeros(1, usage.num_layers, sizes.pop(), dtype=torch.int64)
    for layer, entry in usage.total.items():
        counts[0, layer] = torch.from_numpy(entry.counts)
    torch.save({"logical_count": counts}, path)
