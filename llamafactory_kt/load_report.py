"""The load table: what was loaded where. And the structure dump that kt_debug prints."""

from __future__ import annotations

import io
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from .ground.errors import ranges
from .ground.machine import available_memory, gib
from .ground.paging import spread_over
from .ground.streams import terminal_width
from .model.memory import nbytes_by_device
from .model.on_gpu.placement import by_device
from .model.state import kt_state
from .native.library import library
from .native.packed import GROUP
from .native.quantized_tensor import QuantizedTensor

TITLE = "KTransformers experts"

Rows = list[tuple[str, str]]
"""the load table: what each row is about, and what it says"""


def load_rows(model: nn.Module) -> Rows:
    """What was loaded where, as it is now."""
    state = kt_state(model)
    wrappers, engine, report = state.wrappers, state.engine, state.report
    experts_bytes = sum(w.engine.nbytes for w in wrappers)
    lora_bytes = sum(w.engine.lora_nbytes for w in wrappers)
    torch_bytes = nbytes_by_device(model)
    torch_params = sum(p.numel() for p in model.parameters())
    peft_params = _count_lora(model)

    rows = [("Layers wrapped", f"{len(wrappers)} ({ranges([w.layer_idx for w in wrappers])})")]
    if kinds := layer_kinds(model):
        rows.append(("Layer kinds", kinds))
    build = engine.build()
    rows.append(("Engine", f"{engine.name} on {build}" if build else engine.name))
    if isinstance(problem := library(), str):
        rows.append(("Native kernels", f"none: {problem}"))
    packed_files = state.options.packed_files
    if engine.maps_packed_files if packed_files else engine.maps_weights:
        nodes = ", ".join(map(str, spread_over()))
        weights = f"copied into huge pages{f', which take turns over the NUMA nodes {nodes}' if nodes else ''}"
        if state.options.mapped:
            mapped, free = experts_bytes + torch_bytes.get("cpu", 0), available_memory()
            weights = "mapped from its files" if packed_files else "mapped from the checkpoint's files"
            if mapped > free:
                weights += f", and larger than the {gib(free)} that are free: tokens wait for the disk"
        packed = any(w.engine.holds_packed for w in wrappers)
        source = f"{state.stored} as the checkpoint has them, " if packed else ""
        if packed_files:
            source = f"quantized before, in {packed_files}, "
        rows.append(("Weights", source + weights))
    if quantized := [p for p in model.parameters() if isinstance(p, QuantizedTensor)]:
        kind = quantized[0].packed.packing.kind
        cached = f", {state.cached_dense.used} of them quantized before" if state.cached_dense else ""
        rows.append(("Linear layers", f"{len(quantized)} as {kind}, with a scale for each {GROUP} weights{cached}"))
    if bits := state.options.cache_bits:
        kept = f"{bits} bits, with a scale for each head of a token"
        if any(getattr(module, "caches_latents", False) for module in model.modules()):
            kept = "latents, which stay as they are"
        rows.append(("Keys and values", kept))
    if state.prompts is not None:
        rows.append(
            ("Earlier prompts", f"kept for the next ones, up to {gib(state.prompts.most_nbytes)} of keys and values")
        )
    workers = engine.describe_workers(state.plan, state.options)
    rows.append(("Threads", f"{workers}{'; ' if workers else ''}torch {torch.get_num_threads()}"))
    if state.reason:
        rows.append(("Chosen because", state.reason))
    cpu = experts_bytes + lora_bytes + torch_bytes.get("cpu", 0)
    lora = f"their LoRA {gib(lora_bytes)}, " if lora_bytes else ""
    parts = f"experts {gib(experts_bytes)}, {lora}other {gib(torch_bytes.get('cpu', 0))}"
    rows.append(("Memory on CPU", f"{gib(cpu)} ({parts})"))
    on_gpu = by_device(state.placement.layers) if state.placement is not None else {}
    gpu = f" and experts {gib(sum(on_gpu.values()))}" if on_gpu else ""
    rows.append(("Memory on GPU", f"{gib(torch_bytes['cuda'])}{gpu}" if "cuda" in torch_bytes else "none"))
    if state.placement is not None:
        rows.append(("Experts on GPU", state.placement.describe()))
    if state.choices:
        rows.append(("Adapters", f"{', '.join(state.choices)}, to choose from; below, what is applied now"))
    rows.append(("LoRA tensors", str(report) if report else "no adapter"))
    if report:
        merged = ", merged into the weights" if report.merged else ""
        rows.append(("LoRA layers", f"{len(report.layers)} with expert LoRA, rank up to {report.max_rank}{merged}"))
    experts_params = sum(w.info.shape.num_weights for w in wrappers)
    rows.append(("Parameters", f"torch {torch_params - peft_params:,}, KT experts {experts_params:,}"))
    if report and not report.merged:
        rows.append(("LoRA parameters", f"PEFT {peft_params:,}, KT experts {report.expert_params:,}"))
    return rows


def load_table(rows: Rows) -> str:
    """One table of plain text, ready for a log line of its own."""
    table = Table(title=TITLE, show_header=False, title_justify="left")
    for row in rows:
        table.add_row(*row)
    console = Console(file=io.StringIO(), width=terminal_width(110), color_system=None)
    console.print(table)
    text: str = console.file.getvalue()  # type: ignore[attr-defined]
    return text.rstrip()


def load_markdown(rows: Rows, title: str = TITLE) -> str:
    """The same for a page.

    >>> print(load_markdown([("Layers wrapped", "3 (1-3)")]))
    | KTransformers experts | |
    |---|---|
    | Layers wrapped | 3 (1-3) |
    """
    return "\n".join([f"| {title} | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)])


def layer_kinds(model: Any) -> str:
    """``MoE 1-3, dense MLP 0 (first_k_dense_replace: 1)``, with the keys of config.json that decide it; empty where all
    layers are MoE layers."""
    config = model.config.get_text_config()
    moe = [wrapper.layer_idx for wrapper in kt_state(model).wrappers]
    dense = [layer for layer in range(config.num_hidden_layers) if layer not in moe]
    if not dense:
        return ""
    neutral = {"first_k_dense_replace": 0, "decoder_sparse_step": 1, "mlp_only_layers": [], "moe_layer_freq": 1}
    values = {name: getattr(config, name, None) for name in neutral}
    deciding = ", ".join(f"{name}: {value}" for name, value in values.items() if value not in (None, neutral[name]))
    return f"MoE {ranges(moe)}, dense MLP {ranges(dense)}" + (f" ({deciding})" if deciding else "")


def debug_structure(model: nn.Module) -> str:
    """The block that early KTransformers chats printed after loading, line by line."""
    wrappers = kt_state(model).wrappers
    lora = [(n, p) for n, p in model.named_parameters() if "lora_" in n]
    line = "=" * 60
    lines = [
        line,
        "DEBUG: Model structure after loading",
        line,
        f"KT wrappers count: {len(wrappers)}",
        f"KT MoE LoRA layers: {[w.layer_idx for w in wrappers if w.engine.lora_rank]}",
        "",
        f"LoRA parameters count: {len(lora)}",
        "LoRA parameters:",
        *(f"  {name}: {parameter.shape}" for name, parameter in lora),
        "",
        f"PEFT config: {getattr(model, 'peft_config', {})}",
        line,
    ]
    return "\n".join(lines)


def _count_lora(model: nn.Module) -> int:
    """Parameters of PEFT's LoRA in the model."""
    return sum(p.numel() for n, p in model.named_parameters() if "lora_" in n)
