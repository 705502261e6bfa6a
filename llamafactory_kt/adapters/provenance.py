"""What the program that wrote an adapter on fused weights tells about its layout, where shapes do not."""

from __future__ import annotations

import logging
import re

from ..ground.errors import KTAdapterError
from ..ground.json_files import read_json_object
from ..ground.tensors.stores import is_there
from .config import LoraSettings

logger = logging.getLogger(__name__)

_AUTOMODEL = "automodel_peft_config.json"
_MEGATRON_BRIDGE = {
    "peft_type", "auto_mapping", "base_model_name_or_path", "bias", "fan_in_fan_out", "inference_mode", "init_lora_weights", "lora_alpha",
    "lora_dropout", "modules_to_save", "r", "rank_pattern", "alpha_pattern", "target_modules", "task_type", "use_dora", "use_rslora",
    "target_parameters",
}  # fmt: skip
"""the keys, all of them, that its ``build_adapter_config_dict`` writes; PEFT writes more"""


def peft_layout(settings: LoraSettings) -> tuple[int, int] | None:
    """The version of PEFT in whose layout the tensors are: NeMo AutoModel says it in a file of its own, PEFT in ``peft_version``."""
    text = settings.raw.get("peft_version")
    stamp = settings.path.with_name(_AUTOMODEL)
    if is_there(stamp):
        text = read_json_object(stamp, KTAdapterError).get("paramwrapper_layout") or text
    match = re.match(r"(?:peft-)?(\d+)\.(\d+)", str(text or ""))
    return (int(match[1]), int(match[2])) if match else None


def grouped_by_expert(settings: LoraSettings) -> bool:
    """Whether an expert's columns of lora_B [out, r*E] are neighbors. PEFT's are E apart (``ParamWrapper.get_delta_weight``).

    Unsloth records it as ``lora_B_layout``. Before 2026.9.6 it did not, and trained with neighbors (its ``saved_lora_b_layouts`` reads
    such adapters so); Megatron-Bridge writes neighbors (its ``_pack_target_parameter_adapter_weights``).

    Raises:
        KTAdapterError: Unsloth recorded several layouts in one adapter.
    """
    raw, auto_mapping = settings.raw, settings.raw.get("auto_mapping")
    if declared := raw.get("lora_B_layout"):
        return bool(declared == "grouped_by_expert")
    if raw.get("unsloth_fused_expert_lora"):
        raise KTAdapterError(
            f"{settings.path}: unsloth_fused_expert_lora says that the weights' lora_B have several layouts; save the adapter again with "
            "one."
        )
    unsloth = isinstance(auto_mapping, dict) and bool(auto_mapping.get("unsloth_fixed"))
    if not unsloth and set(raw) != _MEGATRON_BRIDGE:
        return False
    logger.warning(
        "%s was written by %s: each expert's columns of lora_B are taken to be neighbors, as it %s. If this adapter is in PEFT's order, set "
        'lora_B_layout to "rank_major" in that file.',
        settings.path, *(("Unsloth", "trained before 2026.9.6") if unsloth else ("Megatron-Bridge", "writes them")),
    )  # fmt: skip
    return True
