"""``llamafactory-kt convert``, ``merge`` and ``quantize``: adapters and checkpoints into other forms."""

from __future__ import annotations

import logging
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path

import typer

from ..ground.errors import KTOutputError
from .output import JSON, OUTPUT, OVERWRITE, one_of, report, usage_errors

_METHODS, _DENSE = ("int8", "int4", "amxint8", "amxint4"), ("same", "int8", "int4")
_MODEL = typer.Option(..., help="Checkpoint directory (safetensors).")


class Format(StrEnum):
    """Layouts of an output directory."""

    peft = "peft"
    kt_bundle = "kt-bundle"
    sglang = "sglang"
    sglang_merged = "sglang-merged"


def convert(
    input: Path = typer.Option(..., help="Adapter directory, or its tensor file."),
    output: Path = typer.Option(..., help="moe_lora.pt, a .safetensors file, or a directory (with --format)."),
    config: Path = typer.Option(None, help="adapter_config.json; default: the one beside the input."),
    lora_alpha: float = typer.Option(None, help="lora_alpha where no adapter_config.json gives one (32 by default)."),
    format: Format = typer.Option(None, help="Layout of an output directory."),
    model: Path = typer.Option(None, help="The adapter's model (its config.json), for LoRA on fused weights."),
    overwrite: bool = OVERWRITE,
    verbose: bool = typer.Option(False, "-v", "--verbose", help="Log details."),
    json_file: Path = JSON,
) -> None:
    """Convert an adapter's routed-expert LoRA, for SGLang, kt-kernel or PEFT."""
    level = logging.DEBUG if verbose else logging.WARNING
    logging.basicConfig(level=level, format="%(levelname)s:%(name)s:%(message)s", force=True)
    if output.is_file() and not overwrite:
        raise KTOutputError(f"{output} exists; choose another output, or give --overwrite.")
    from ..tools.convert import convert_peft_to_kt_format

    layout = format.value if format else None
    with usage_errors():
        done = convert_peft_to_kt_format(input, output, lora_alpha, config, layout, model, overwrite)
    text = f"{output}: {done['total_keys']} expert tensors as {layout or output.suffix[1:]}; {done['num_experts']} experts a layer, rank {done['lora_rank']}, lora_alpha {done['lora_alpha']:g}."
    if done["status"] == "skipped":
        text = f"{input} has no LoRA for routed experts; nothing was written."
    report(done, json_file, lambda: typer.echo(text))


def merge(
    model: Path = _MODEL,
    adapter: Path = typer.Option(..., help="Adapter directory, any layout."),
    output: Path = OUTPUT,
    overwrite: bool = OVERWRITE,
    json_file: Path = JSON,
) -> None:
    """Merge attention, dense, shared-expert, router and routed-expert LoRA; stock transformers loads the result."""
    from ..tools.merge import merge_adapter

    done = merge_adapter(model, adapter, output, overwrite=overwrite)
    text = (
        f"Wrote {done.output}: {done.tensors} tensors in {done.files} file(s), {done.merged} of them changed; "
        f"merged {done.adapter_tensors} of {done.adapter_tensors} adapter tensors."
    )
    report(asdict(done), json_file, lambda: typer.echo(text))


def quantize(
    model: Path = _MODEL,
    output: Path = typer.Option(..., help="Directory for kt_weight_path; complete layers in it are kept."),
    method: str = typer.Option(
        "int8",
        metavar="|".join(_METHODS),
        autocompletion=one_of(_METHODS),
        help="int8 or int4: for kt_backend INT8 and INT4; amxint8 or amxint4: kt-kernel's, for AMXINT8 and AMXINT4.",
    ),
    dense: str = typer.Option(
        None,
        metavar="|".join(_DENSE),
        autocompletion=one_of(_DENSE),
        help="With int8 and int4, also the linear layers around the experts, for this kt_dense; same: none of them. Default: the method's.",
    ),
    threadpool_count: int = typer.Option(
        None,
        min=1,
        help="With amxint8 and amxint4, NUMA sub-pools, the kt_threadpool_count of later chats; default: one per NUMA node.",
    ),
    threads: int = typer.Option(None, min=1, help="Threads that quantize; default: the physical cores."),
    overwrite: bool = typer.Option(False, "--overwrite", help="Start anew: remove all layers in the output first."),
    json_file: Path = JSON,
) -> None:
    """Quantize a model once, layer by layer, into files that chats load (kt_weight_path); continues an interrupted run."""
    from ..ground.machine import gib
    from ..tools.quantize import quantize_model

    with usage_errors():
        done = quantize_model(
            model, output, method, dense=dense, pools=threadpool_count, threads=threads, overwrite=overwrite
        )
    kept = f", {done.kept} were there already" if done.kept else ""
    around = f"; weights around the experts: {done.dense}" if done.dense else ""
    text = f"{done.output}: {done.layers} layers packed as {done.method}{kept}{around}; {gib(done.nbytes)} in all."
    report(asdict(done), json_file, lambda: typer.echo(text))
