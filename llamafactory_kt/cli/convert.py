"""``llamafactory-kt convert``: any adapter layout into any other that can hold it."""

from __future__ import annotations

import logging
from enum import StrEnum
from pathlib import Path

import typer


class Format(StrEnum):
    """Layouts of an output directory."""

    peft = "peft"
    kt_bundle = "kt-bundle"
    sglang = "sglang"
    sglang_merged = "sglang-merged"


def convert(
    input: Path = typer.Option(..., help="Adapter directory, or its tensor file."),
    output: Path = typer.Option(..., help="moe_lora.pt, a .safetensors file, or a directory (with --format)."),
    config: Path = typer.Option(
        None, help="adapter_config.json; default: the one beside the input.", show_default=False
    ),
    lora_alpha: float = typer.Option(
        None, help="lora_alpha where no adapter_config.json gives one (32 by default).", show_default=False
    ),
    format: Format = typer.Option(None, help="Layout of an output directory.", show_default=False),
    verbose: bool = typer.Option(False, "--verbose", help="Show more of what is done."),
) -> None:
    """Convert an adapter's routed-expert LoRA, for SGLang, kt-kernel or PEFT."""
    logging.basicConfig(
        level=logging.DEBUG if verbose else logging.INFO, format="%(levelname)s:%(name)s:%(message)s", force=True
    )
    from ..tools.convert import convert_peft_to_kt_format

    convert_peft_to_kt_format(input, output, lora_alpha, config, format.value if format else None)
