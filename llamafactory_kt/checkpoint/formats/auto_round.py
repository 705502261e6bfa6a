"""AutoRound's own exports, whose integers are packed as GPTQ's or AWQ's. ``packing_format`` says which (``backend``, before version 0.5):

- ``auto_round:auto_gptq`` is GPTQ's first version, with zero points less one; symmetric weights are always so. ``g_idx`` is not stored.
- ``auto_round`` and ``auto_round:gptqmodel`` are the second, with zero points as they are.
- ``auto_round:auto_awq`` is AWQ's ``gemm``.

``extra_config`` gives layers settings of their own; 16 bits are not quantized.

(auto_round/export/export_to_autoround/export.py, auto_round_extension/torch/qlinear_torch.py and qlinear_torch_zp.py, and
auto_round/inference/backend.py of the library; https://github.com/intel/auto-round)
"""

from __future__ import annotations

from ...ground.errors import KTModelError
from .awq import Awq
from .format import Format
from .gptq import Gptq
from .values import Values

_FIRST = ("auto_round:auto_gptq", "auto_round:gptq", "auto_round:gptq:exllamav2", "auto_gptq", "gptq")
_SECOND = ("auto_round", "auto_round:gptqmodel")
_AWQ = ("auto_round:auto_awq", "auto_round:awq")
_PLAIN = 16
"""bits of what is not quantized"""


def auto_round(values: Values) -> Format | None:
    """The format of ``quant_method: auto-round``, None if it is another method.

    Raises:
        KTModelError: It cannot be read.
    """
    if values.text("quant_method") not in ("auto-round", "intel/auto-round"):
        return None
    backend = values.text("backend")
    packing = values.text("packing_format", default=None if backend == "auto" else backend) or _FIRST[0]
    bits, group = values.integer("bits"), values.group_size("group_size", default=128)
    layers = {"": values, **values.sections("extra_config")}
    other = [
        name or packing for name, changes in layers.items()
        if (changes.integer("bits", default=bits) or 0) < _PLAIN and not _is_read(changes, group)
    ]  # fmt: skip
    readable = (4,) if packing in _AWQ else (4, 8)
    if packing not in (*_FIRST, *_SECOND, *_AWQ) or bits not in readable or other:
        raise KTModelError(
            f"The AutoRound checkpoint has packing_format: {packing}, bits: {bits} in {values.file}, and settings that cannot be read for: "
            f"{other or None}; integers packed as GPTQ (4 or 8 bits) or AWQ (4 bits), in groups of one size and with activations of 16 "
            "bits, are supported. Use the model's unquantized checkpoint."
        )
    if packing in _AWQ:
        return Awq(group)
    return Gptq(group, first_version=packing in _FIRST, ordered=False, symmetric=values.flag("sym", default=False))


def _is_read(changes: Values, group: int | None) -> bool:
    """Whether integers are packed with these settings as GPTQ packs them, with activations as they are."""
    return (
        Gptq.reads(changes, group)
        and changes.text("data_type", default="int") == "int"
        and (changes.integer("act_bits", default=_PLAIN) or 0) >= _PLAIN
        and changes.integer("super_bits") is None
    )
