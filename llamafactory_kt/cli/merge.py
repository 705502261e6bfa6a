"""``llamafactory-kt merge``: a checkpoint with a whole adapter merged into it."""

from __future__ import annotations

from pathlib import Path

import typer


def merge(
    model: Path = typer.Option(..., help="Checkpoint directory (safetensors)."),
    adapter: Path = typer.Option(..., help="Adapter directory, any layout."),
    output: Path = typer.Option(..., help="Directory to write; must not exist or be empty."),
) -> None:
    """Merge attention, dense, shared-expert, router and routed-expert LoRA; stock transformers loads the result."""
    from ..tools.merge import merge_adapter

    report = merge_adapter(model, adapter, output)
    typer.echo(
        f"Wrote {report.output}: {report.tensors} tensors in {report.files} file(s), {report.merged} of them changed; "
        f"merged {report.adapter_tensors} of {report.adapter_tensors} adapter tensors."
    )
