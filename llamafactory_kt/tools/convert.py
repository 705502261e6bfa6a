"""Convert adapters between layouts."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from ..adapters import Adapter, ExpertsShape, ProjectionAdapter, open_adapter, open_files
from ..adapters.config import CONFIG
from ..adapters.keys import parse_expert_key
from ..adapters.target_parameters import TargetParametersAdapter
from ..adapters.uniform import Uniform
from ..adapters.writing import WRITERS, write_moe_lora, write_stacked
from ..checkpoint.opening import MoEModel, empty_model
from ..ground.atomic_output import check_apart, check_free
from ..ground.errors import KTConfigError, KTPathError

logger = logging.getLogger(__name__)

DEFAULT_ALPHA = 32.0


def parse_moe_key(key: str) -> tuple[int, int, Literal["gate", "up", "down"], Literal["a", "b"]] | None:
    """Parse the name of a routed expert's LoRA tensor into (layer, expert, projection, side); None for other tensors.

    >>> parse_moe_key("base_model.model.model.layers.1.mlp.original_moe.experts.5.gate_proj.lora_A.weight")
    (1, 5, 'gate', 'a')
    """
    found = parse_expert_key(key)
    return tuple(found) if found is not None else None  # type: ignore[return-value]


def convert_peft_to_kt_format(
    input_path: str | Path, output_path: str | Path, lora_alpha: float | None = None,
    config_path: str | Path | None = None, format: str | None = None, model_path: str | Path | None = None,
    overwrite: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """Convert an adapter's routed-expert LoRA.

    Args:
        input_path: an adapter directory, or its tensor file.
        output_path: ``.pt`` for a ``moe_lora.pt``; ``.safetensors`` for the same tensors in one safetensors file; any
            other name is a directory of the given ``format``.
        lora_alpha: alpha if no configuration gives one (default 32); a configuration takes precedence.
        config_path: ``adapter_config.json``; by default the one beside the input.
        format: layout of a directory: ``peft``, ``kt-bundle``, ``sglang`` or ``sglang-merged``.
        model_path: the adapter's model, of which ``config.json`` is read: it tells what an adapter on fused weights does not.
        overwrite: a directory may also be that of an earlier conversion. Files are replaced in any case.

    Returns:
        ``status`` (``success``, or ``skipped`` without expert LoRA), ``num_layers``, ``num_experts``, ``lora_rank``,
        ``lora_alpha`` and ``total_keys``.

    Raises:
        KTPathError: The input, or the model, does not exist.
        KTModelError: The model has no experts that are understood.
        KTAdapterError: The adapter is broken, or the target cannot hold it. No output is left behind.
        KTConfigError: The output's name contradicts the format.
    """
    output = Path(output_path)
    write = _writer(output, format, CONFIG if overwrite else None)
    check_apart(output, input_path)
    logger.info("Loading adapter from: %s", input_path)
    adapter = _open(Path(input_path), config_path, lora_alpha)
    result: dict[str, Any] = {
        "status": "skipped", "num_layers": 0, "num_experts": 0, "lora_rank": adapter.settings.r,
        "lora_alpha": float(adapter.settings.lora_alpha), "total_keys": 0,
    }  # fmt: skip
    if not adapter.layers:
        logger.warning("No MoE expert LoRA keys found in %s; nothing to convert", adapter.store.path)
        return result
    logger.info("Found %d MoE expert LoRA keys", len(adapter.expert_names))
    uniform = Uniform.of(adapter, _shapes(adapter, model_path))
    logger.info("Saving to: %s", output)
    started = time.perf_counter()
    write(uniform, output)
    logger.debug("Wrote %s in %.1f s", output, time.perf_counter() - started)
    result |= {
        "status": "success", "num_layers": uniform.num_layers, "num_experts": uniform.num_experts,
        "lora_rank": uniform.lora_rank, "lora_alpha": uniform.lora_alpha, "total_keys": len(adapter.expert_names),
    }  # fmt: skip
    logger.info("Conversion complete: %s", result)
    return result


def _shapes(adapter: Adapter, model_path: str | Path | None) -> dict[int, ExpertsShape] | None:
    """The model's experts in the adapter's layers; None without a model."""
    if model_path is not None:
        shapes = MoEModel(empty_model(model_path, quantized=True)).shapes
        adapter.check_fits(shapes)
        return {layer: shapes[layer] for layer in adapter.layers}
    if isinstance(adapter, TargetParametersAdapter):
        logger.warning(
            "%s: gate and up are taken to lie one after the other in gate_up_proj. Where they take turns, as in gpt-oss, give --model.",
            adapter.store.path,
        )  # fmt: skip
    return None


def _writer(output: Path, format: str | None, earlier: str | None) -> Callable[[Uniform, Path], None]:
    by_name = {".pt": write_moe_lora, ".safetensors": write_stacked}.get(output.suffix)
    if by_name is not None:
        if format is not None:
            raise KTConfigError(f"--format {format} writes a directory, but the output {output} is a file's name.")
        return by_name
    if format not in WRITERS:
        raise KTConfigError(
            f"{output} names a directory, so --format must be one of {', '.join(WRITERS)}; for a file, end its name in .pt or .safetensors."
        )
    check_free(output, earlier)
    write = WRITERS[format]
    return lambda uniform, path: write(uniform, path, earlier)


def _open(path: Path, config_path: str | Path | None, lora_alpha: float | None) -> Adapter:
    config = Path(config_path) if config_path is not None else None
    if config is not None and (path.is_dir() or path.suffix == ".pt"):
        own = "has an adapter_config.json of its own" if path.is_dir() else "carries rank and alpha itself"
        raise KTConfigError(f"--config goes with a tensor file; {path} {own}.")
    if path.is_dir():
        adapter = open_adapter(path)
    else:
        for needed in (path, config):
            if needed is not None and not needed.is_file():
                raise KTPathError(f"{needed} does not exist or is not a file.")
        adapter = open_files(path, config, DEFAULT_ALPHA if lora_alpha is None else lora_alpha)
        if adapter.settings.path == path and isinstance(adapter, ProjectionAdapter):
            source = "the default" if lora_alpha is None else "the command line"
            logger.warning(
                "No adapter_config.json: lora_alpha %g is taken from %s", adapter.settings.lora_alpha, source
            )
    configured = adapter.settings.lora_alpha
    if lora_alpha is not None and lora_alpha != configured:
        logger.warning(
            "lora_alpha %g from %s is used, not %g from the command line", configured, adapter.settings.path, lora_alpha
        )
    return adapter
