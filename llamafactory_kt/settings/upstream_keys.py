"""What the keys mean here that LLaMA-Factory, KTransformers' forks and their YAMLs have for ``use_kt``.

Sources: ``KTransformersArguments`` of LLaMA-Factory 0.9.4, 0.9.5 and its main branch, and ``kt_kernel.sft.KTConfig``, whose fields
are the keys of ``kt_config``.
"""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Mapping
from typing import Any

from ..engines.ktkernel import PACKING
from ..engines.ktkernel.packed_files import holds_kt_files
from ..engines.native.integer_files import holds_integers
from ..engines.native.integers import INTEGERS
from ..engines.registry import AUTO, canonical_name
from ..ground.errors import KTConfigError
from .keys import KTArguments, expanded

logger = logging.getLogger(__name__)

SAME = {"cpu_infer": "kt_num_threads", "chunk_size": "kt_max_chunk"}
"""keys of LLaMA-Factory 0.9.4 -> ours with the same meaning"""

IDLE = frozenset(
    {
        # of training
        "kt_activation_policy", "kt_checkpoint_files", "kt_cpu_activation", "kt_force_fused_expert_lora",
        "kt_full_weight_grad", "kt_lora_alpha", "kt_lora_dropout", "kt_lora_expert_intermediate_size",
        "kt_lora_expert_num", "kt_lora_rank", "kt_max_cache_depth", "kt_model_max_length", "kt_share_backward_bb",
        "kt_share_cache_pool", "kt_sharded_metadata", "kt_skip_expert_loading", "kt_train_mode", "kt_use_lora_experts",
        "kt_weight_lifecycle",
        # of KTransformers' own engine: where modules go, its memory, its speed
        "kt_maxlen", "kt_non_expert_weight_path", "kt_optimize_rule", "kt_use_cuda_graph",
    }
)  # fmt: skip
"""keys that change no answer of ours"""

ONLY: dict[str, tuple[Any, str]] = {
    "enabled": (True, "Use use_kt: false for a chat without KTransformers"),
    "mode": ("normal", "Remove it: attention here is the model's own"),
    "kt_mode": ("normal", "Remove it: attention here is the model's own"),
    "kt_force_think": (False, "Use LLaMA-Factory's enable_thinking: true"),
}
"""keys that would change the answers unless they have this value; and what to write instead"""

FORMATS = {
    **dict.fromkeys(("bf16", "fp8", "rawint4", "mxfp4"), AUTO), **{name: engine.name for name, engine in PACKING.items()},
}  # fmt: skip
"""``kt_expert_weight_format`` -> ``kt_backend``. Experts of a quantized checkpoint are read as they are."""

BACKENDS = {"FP8": FORMATS["fp8"], "AMXFP8": FORMATS["fp8"]}
"""values of ``kt_backend`` that the forks spell in another way"""
OF_KT_FILES = {name.upper(): FORMATS[name] for name in PACKING}
"""the same where ``kt_weight_path`` holds kt-kernel's files; ``INT8`` and ``INT4`` are this package's own engines"""
OF_INTEGERS = {**FORMATS, **{engine.name.lower(): engine.name for engine in INTEGERS}}
""":data:`FORMATS` where it holds this package's"""

_FORMAT, _CHECKPOINT = "kt_expert_weight_format", "kt_expert_checkpoint_path"
KEYS = frozenset({*SAME, *IDLE, *ONLY, _FORMAT, _CHECKPOINT})
"""all keys that are not ours"""

_OURS = KTArguments.__dataclass_fields__


def gather(values: dict[str, Any]) -> dict[str, Any]:
    """A configuration with ``use_kt`` whose ``kt_*`` keys that are not ours, and the other :data:`KEYS`, are in ``kt_config``.

    There :func:`translate` finds them, and LLaMA-Factory, which knows some of them in some versions, sees none.

    Args:
        values: as read from a YAML; not changed.

    Raises:
        KTConfigError: A key has two values.
    """
    if values.get("infer_backend") == "ktransformers":  # 0.9.4's name for a chat with the experts in its own process
        values = {**values, "infer_backend": "huggingface"}
    moved = {k: v for k, v in values.items() if k in KEYS or (str(k).startswith("kt_") and k not in _OURS)}
    if not moved:
        return values
    nested = dictionary(values.get("kt_config"))
    for key in moved.keys() & nested.keys():
        if moved[key] != nested[key]:
            raise KTConfigError(two_values(key, moved[key], "kt_config", nested[key]))
    rest = {key: value for key, value in values.items() if key not in moved}
    return {**rest, "kt_config": {**nested, **moved}}


def gather_words(words: list[str]) -> list[str]:
    """The same for a command line of ``--key value``."""
    spelled = {word[2:].partition("=")[0].replace("-", "_") for word in words if word.startswith("--kt")}
    foreign = {key for key in spelled if not any(ours.startswith(key) for ours in _OURS)}  # argparse completes names
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, argument_default=argparse.SUPPRESS)
    for key in sorted({*KEYS, *foreign, "kt_config", "infer_backend"}):
        parser.add_argument(f"--{key}", f"--{key.replace('_', '-')}", dest=key, nargs="?", const="true")
    given, rest = parser.parse_known_args(words)
    values = {key: value if key == "kt_config" else _typed(value) for key, value in vars(given).items()}
    return rest + [f"--{k}={v if isinstance(v, str) else json.dumps(v)}" for k, v in gather(values).items()]


def _typed(word: str) -> Any:
    """What a YAML would hold."""
    try:
        return json.loads(word.lower())
    except ValueError:
        return word


def dictionary(kt_config: Any) -> dict[str, Any]:
    """``kt_config``, which may be JSON or missing.

    Raises:
        KTConfigError: It is something else.
    """
    if isinstance(kt_config, str):
        try:
            kt_config = json.loads(kt_config)
        except ValueError as error:
            raise KTConfigError(f"kt_config is not valid JSON: {error}.") from error
    if not isinstance(kt_config, dict | None):
        raise KTConfigError(f"kt_config must be a dictionary of kt_* keys, found {type(kt_config).__name__}.")
    return kt_config or {}


def two_values(key: str, value: Any, source: str, other: Any) -> str:
    """What to say about a key that is set twice."""
    return f"{key} is {value!r}, but {source} says {other!r}; keep one."


def translate(args: Any, nested: dict[str, Any]) -> tuple[dict[str, tuple[str, Any]], list[str]]:
    """Take these keys out of ``kt_config`` and ``args``, and name those that mean nothing in one warning.

    Args:
        args: LLaMA-Factory's ModelArguments with our keys.
        nested: ``kt_config``.

    Returns:
        Our key -> how the configuration spells it, and its value; and what is wrong.
    """
    theirs = {key: value for key, value in nested.items() if key in KEYS and value is not None}
    ours = {key: ("kt_config", value) for key, value in nested.items() if key not in KEYS}
    problems = []
    for key, value in sorted(theirs.items()):
        if key in SAME:
            if (other := ours.get(SAME[key], (key, value)))[1] != value:
                problems.append(two_values(SAME[key], other[1], key, value))
            ours[SAME[key]] = (key, value)
        elif key in ONLY and value != ONLY[key][0]:
            problems.append(f"{key}: {value} has no meaning in this package. {ONLY[key][1]}.")
        elif key == _CHECKPOINT and str(value) != str(args.model_name_or_path):
            problems.append(
                f"{key}: the experts are read from model_name_or_path, or packed from kt_weight_path. Name {value} there, if it "
                "is the whole model."
            )
    if idle := sorted(theirs.keys() & IDLE):
        logger.warning("%s: keys of KTransformers' training and engine, which do nothing in a chat.", ", ".join(idle))
    files = ours.get("kt_weight_path", ("", args.kt_weight_path))[1]
    root = expanded(files) if isinstance(files, str) else None
    own = root is not None and holds_integers(root)
    spellings = {**BACKENDS, **(OF_KT_FILES if root is not None and not own and holds_kt_files(root) else {})}
    args.kt_backend = spellings.get(str(args.kt_backend).upper(), args.kt_backend)
    if "kt_backend" in ours:
        source, value = ours["kt_backend"]
        ours["kt_backend"] = source, spellings.get(str(value).upper(), value)
    if _FORMAT in theirs:
        backend = ours.get("kt_backend", ("", args.kt_backend))[1]
        problems += _apply_format(theirs[_FORMAT], backend, ours, OF_INTEGERS if own else FORMATS)
    return ours, problems


def _apply_format(
    value: Any, backend: Any, ours: dict[str, tuple[str, Any]], formats: Mapping[str, str]
) -> list[str]:  # fmt: skip
    """Choose the engine that computes with such weights."""
    wanted = formats.get(str(value).lower())
    if wanted is None:
        return [
            f"{_FORMAT}: {value} cannot be computed here, expected one of {', '.join(FORMATS)}. For four bits, write kt_backend: "
            "INT4."
        ]
    try:
        chosen = canonical_name(backend)
    except KTConfigError:
        return []  # reported with the other values
    if chosen == str(value).upper():
        return []
    if wanted != AUTO and chosen == AUTO:
        ours["kt_backend"] = (_FORMAT, wanted)
    elif wanted != chosen and (wanted != AUTO or chosen in formats.values()):
        return [f"{_FORMAT}: {value} means kt_backend: {wanted}, but kt_backend is {chosen}; keep one."]
    return []
