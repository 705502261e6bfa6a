"""A summary of each command, and examples of how it is used."""

from __future__ import annotations

from collections.abc import Iterable

HELP: dict[str, tuple[str, ...]] = {
    "bench": (
        "Measure speed, memory and quality of a configuration.",
        "bench chat.yaml --against stock",
        "bench chat.yaml --against kt_backend=INT4 --prompt-tokens 128,1024 --json figures.json",
        "bench chat.yaml --quality my-text.txt --against kt_backend=INT4",
        "bench --synthetic qwen3-30b-a3b:4",
        "bench --endpoint http://127.0.0.1:8000",
    ),
    "cache list": ("List the adapters prepared for SGLang.", "cache list", "cache list --json"),
    "cache clean": ("Remove the adapters prepared for SGLang.", "cache clean --gone"),
    "compare": (
        "Compare what several configurations answer.",
        "compare base.yaml lora.yaml --prompts prompts.jsonl --output out",
        "compare chat.yaml --ablate kt_backend=INT8 --prompts prompts.jsonl --output out --overwrite",
    ),
    "convert": (
        "Convert an adapter for SGLang, kt-kernel or PEFT.",
        "convert --input my_adapter --output moe_lora.pt",
        "convert --input my_adapter --output for_peft --format peft",
    ),
    "demo": ("Answer prompts without and with an adapter.", "demo", "demo --log"),
    "doctor": (
        "Say what prevents a chat on this machine.",
        "doctor",
        "doctor chat.yaml",
        "doctor chat.yaml kt_backend=INT4 -v",
    ),
    "estimate": (
        "Say what a model will take, before its download.",
        "estimate Qwen/Qwen3-30B-A3B",
        "estimate config.json",
        "estimate my_model --adapter my_adapter --json figures.json",
    ),
    "generate": (
        "Answer a file of prompts.",
        "generate chat.yaml --prompts prompts.jsonl --output answers.jsonl",
        "generate chat.yaml temperature=0.7 --prompts prompts.jsonl --output answers.jsonl --seed 1 --overwrite",
    ),
    "inspect": (
        "Say what an adapter holds, and whether it fits.",
        "inspect my_adapter",
        "inspect my_adapter --model my_model --values --heatmap changed.png",
        "inspect my_adapter --json adapter.json",
    ),
    "merge": (
        "Merge an adapter into a checkpoint.",
        "merge --model my_model --adapter my_adapter --output merged",
        "merge --model my_model --adapter my_adapter --output merged --overwrite",
    ),
    "quantize": (
        "Quantize a model once, for later chats.",
        "quantize --model my_model --output my_model-int4 --method int4",
    ),
    "serve": (
        "Start SGLang's server with a configuration.",
        "serve chat.yaml",
        "serve chat.yaml kt_num_threads=16 -- --port 30001",
        "serve chat.yaml --dry-run",
    ),
    "stats": (
        "Count the experts that a file of prompts uses.",
        "stats chat.yaml --prompts prompts.jsonl --output usage",
        "stats chat.yaml --prompts prompts.jsonl --output usage --split-by language --overwrite",
    ),
    "verify": (
        "Check what a loaded model computes.",
        "verify chat.yaml",
        "verify chat.yaml kt_backend=INT8 --layers 1,3-5",
    ),
}
"""command -> a summary, and command lines without the program's name"""


def examples(lines: Iterable[str]) -> str:
    """For the end of a help text; each line stays one."""
    return "\b\nExamples:\n" + "\n".join(f"  llamafactory-kt {line}" for line in lines)
