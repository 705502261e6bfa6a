"""``llamafactory-kt quantize``: a model's routed experts as INT8 or INT4, once and for all."""

from __future__ import annotations

from pathlib import Path

import typer

from ..ground.machine import gib


def quantize(
    model: Path = typer.Option(..., help="Checkpoint directory (safetensors)."),
    output: Path = typer.Option(..., help="Directory for kt_weight_path; what is complete in it is kept."),
    method: str = typer.Option("int8", help="int8 or int4."),
    threadpool_count: int = typer.Option(
        None,
        min=1,
        show_default=False,
        help="NUMA sub-pools: kt_threadpool_count of the chats to come; default: one per NUMA node.",
    ),
    threads: int = typer.Option(None, min=1, help="Worker threads; default: the physical cores.", show_default=False),
) -> None:
    """Pack the routed experts with kt-kernel, layer by layer, for kt_weight_path; continues an interrupted run."""
    from ..tools.quantize import quantize_model

    report = quantize_model(model, output, method, pools=threadpool_count, threads=threads)
    kept = f", {report.kept} were there already" if report.kept else ""
    typer.echo(f"{report.output}: {report.layers} layers packed as {report.method}{kept}; {gib(report.nbytes)} in all.")
