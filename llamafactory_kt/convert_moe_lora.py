"""The names and the command line of SGLang's converter of expert LoRA, for scripts that use them.

python -m llamafactory_kt.convert_moe_lora --input adapter_model.safetensors --config adapter_config.json --output moe_lora.pt
"""

from __future__ import annotations

import sys

from .tools.convert import convert_peft_to_kt_format, parse_moe_key

__all__ = ["convert_peft_to_kt_format", "main", "parse_moe_key"]


def main() -> None:
    """Run ``llamafactory-kt convert``, which logs and replaces a file as SGLang's converter does."""
    from .cli import main as run

    sys.argv[:1] = ["llamafactory-kt", "convert", "--overwrite", "--verbose"]
    run()


if __name__ == "__main__":
    main()
