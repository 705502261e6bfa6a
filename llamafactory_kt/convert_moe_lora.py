"""The names and the command of SGLang's converter of expert LoRA, for scripts that know them.

python -m llamafactory_kt.convert_moe_lora --input adapter_model.safetensors --config adapter_config.json --output moe_lora.pt
"""

from __future__ import annotations

from .tools.convert import convert_peft_to_kt_format, parse_moe_key

__all__ = ["convert_peft_to_kt_format", "main", "parse_moe_key"]


def main() -> None:
    """The same as ``llamafactory-kt convert``."""
    import sys

    from .cli import main as run

    sys.argv[:1] = ["llamafactory-kt", "convert"]
    run()


if __name__ == "__main__":
    main()
