"""What a way of storing weights has to tell: which tensors make up a weight, what they must look like, and the numbers in them.

:class:`Format` itself is that of checkpoints that are not quantized: every tensor is a weight. A format of quantized weights is
a subclass in a file of its own, and a line in :data:`~.FORMATS`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import ClassVar

import torch

from ...native.library import in_panels
from ...native.packed import ALL, PackedWeight, Packing
from ..stored import StoredTensor
from .values import Values

Shape = tuple[int, ...]
ROWS = 8
"""rows are decoded in multiples of these: some formats pack as many into one word"""
_AT_A_TIME = 2**18
"""numbers that a thread decodes at a time, so that what is in between stays in its core's cache"""
WHOLE = "weight"
"""the part that bears the weight's own name; the only one of a weight that is not quantized"""
FLOATS = ("F32", "BF16", "F16")
_QUANTIZED = ("F8", "F4", "I8", "U8")
"""how the dtypes of weights begin that are nothing without a scale"""


@dataclass(frozen=True)
class Wanted:
    """What a part of a weight must look like."""

    shapes: Sequence[Shape]
    """one of these"""
    dtypes: Sequence[str]
    """one of these, by safetensors' names"""
    optional: bool = False

    def fits(self, tensor: StoredTensor) -> bool:
        return tensor.shape in self.shapes and tensor.dtype in self.dtypes

    def __str__(self) -> str:
        return f"{' or '.join(self.dtypes)} {' or '.join(map(str, self.shapes))}"


class Format:
    """Weights as they are. Subclasses say how quantized ones are stored.

    Checkpoints may hold both: a weight whose only part is :data:`WHOLE` is not quantized, whatever the format. So lists of modules
    that were left out (``ignore``, ``modules_to_not_convert``) need no reading.
    """

    title: ClassVar[str] = "unquantized"
    """for messages"""
    end: ClassVar[str] = ""
    """how the names of quantized weights end, as the model names them"""
    parts: ClassVar[Mapping[str, str]] = {}
    """part of a weight -> what its stored name has in place of :attr:`end`"""
    checked: ClassVar[Sequence[str]] = ()
    """parts whose values can be wrong, not only their shapes: small ones, as :meth:`wrong_values` reads them"""
    unused: ClassVar[Sequence[str]] = (
        "activation_scale", ".input_scale", ".input_scale_ub", ".input_zero_point", ".input_global_scale", ".output_scale",
        ".output_zero_point", ".q_scale", ".k_scale", ".v_scale", ".kv_scale", ".k_zero_point", ".v_zero_point",
    )  # fmt: skip
    """how the stored names of tensors end that concern the quantization of activations and caches; here both are floats"""
    in_place: ClassVar[Sequence[str]] = ()
    """parts that the native kernels read where they are stored; of scales, those of :data:`READ`"""
    turned: ClassVar[bool] = False
    """whether weights are stored as [out, in] whose shape is [in, out]"""

    @classmethod
    def from_config(cls, values: Values) -> Format | None:
        """The format that a ``quantization_config`` describes, None if it is another one's.

        Raises:
            KTModelError: It is this one's, in a variant that cannot be read; or a value is of a wrong type.
        """
        return None

    def split(self, name: str) -> tuple[str, str]:
        """A stored tensor's name -> (its weight's, which part of the weight it is)."""
        for part, ending in self.parts.items():
            if part != WHOLE and name.endswith(ending) and not name.endswith(tuple(self.unused)):
                return name.removesuffix(ending) + self.end, part
        return name, WHOLE

    def stored_name(self, weight: str, part: str) -> str:
        """The inverse of :meth:`split`."""
        return weight if part == WHOLE else weight.removesuffix(self.end) + self.parts[part]

    def is_quantized(self, parts: Mapping[str, StoredTensor]) -> bool:
        """Whether these are more than a plain weight."""
        return parts.keys() != {WHOLE} or parts[WHOLE].dtype.startswith(_QUANTIZED)

    def label(self, parts: Mapping[str, StoredTensor]) -> str:
        """The format of one weight in a few characters, as ``F8_E4M3`` or ``INT4``."""
        return self.title if WHOLE not in parts else parts[WHOLE].dtype

    def wanted(self, name: str, shape: Shape, parts: Mapping[str, StoredTensor]) -> Mapping[str, Wanted]:
        """The parts of a quantized weight.

        Args:
            name: the weight's, in the checkpoint.
            shape: of the decoded weight, as the model has it.
            parts: as they are stored, of formats that say nowhere else how many bits this weight has.
        """
        return {WHOLE: Wanted([shape], FLOATS)}

    def problems(self, name: str, parts: Mapping[str, StoredTensor], shape: Shape) -> Iterator[str]:
        """What keeps a quantized weight from being decoded; each names a tensor, what was found and what was wanted."""
        wanted = self.wanted(name, shape, parts)
        for part, want in wanted.items():
            found = parts.get(part)
            if found is None:
                if not want.optional:
                    yield f"{self.stored_name(name, part)} is missing"
            elif not want.fits(found):
                yield f"{found.name} is {found.dtype} {found.shape}, wanted {want}"
        for part in parts.keys() - wanted.keys():
            yield f"{parts[part].name} is not part of {self.title} weights as config.json describes them"

    def wrong_values(self, parts: Mapping[str, torch.Tensor]) -> Iterator[tuple[str, str]]:
        """(part, what is wrong with it) of the parts in :attr:`checked`, whose numbers could not be decoded."""
        yield from ()

    def decode(
        self, parts: Mapping[str, torch.Tensor], shape: Shape, dtype: torch.dtype = torch.float32
    ) -> torch.Tensor:
        """The numbers of one quantized weight.

        Args:
            parts: as :meth:`wanted`; of a fused weight of all experts, those of one expert.
            shape: of the weight, [out, in].
            dtype: to round to, once.

        Returns:
            On the parts' device.
        """
        out, width = shape
        values = torch.empty(out, width, dtype=dtype, device=next(iter(parts.values())).device)
        step = max(1, _AT_A_TIME * torch.get_num_threads() // width // ROWS) * ROWS
        for start in range(0, out, step):
            rows = slice(start, min(start + step, out))
            values[rows] = self.rows(parts, rows, shape)
        return values

    def packing(self, name: str, shape: Shape, parts: Mapping[str, StoredTensor]) -> Packing | None:
        """How the native kernels can use a quantized weight as it is; None if it must be decoded.

        Args:
            as :meth:`wanted`, which the parts fit. Whether the kernels take so many columns, :meth:`Packing.fits` says.
        """
        return None

    def can_pack(self, parts: Mapping[str, torch.Tensor], packing: Packing) -> bool:
        """Whether the numbers in the parts that are :attr:`checked` allow what :meth:`packing` says by headers."""
        return True

    def packed(self, parts: Mapping[str, torch.Tensor], packing: Packing, shape: Shape) -> PackedWeight:
        """The same numbers as :meth:`decode` has, for the native kernels.

        Args:
            parts: as :meth:`decode`.
            packing: what :meth:`packing` said.
            shape: of the packed weight, [out, in].

        Returns:
            Views of the parts where they are :attr:`in_place`.
        """
        raise NotImplementedError

    def rows(self, parts: Mapping[str, torch.Tensor], rows: slice, shape: Shape) -> torch.Tensor:
        """Some rows of a quantized weight, [rows, in] in float32.

        Args:
            rows: start and end are given; the start is a multiple of :data:`ROWS`.
            parts, shape: as in :meth:`decode`.
        """
        raise NotImplementedError


def of_rows(scale: torch.Tensor, rows: slice) -> torch.Tensor:
    """The scales of some rows, [rows, groups], of scales for each row or for the whole weight."""
    scale = scale.reshape(-1, 1) if scale.dim() < 2 else scale
    return scale[rows] if len(scale) > 1 else scale


READ = ("F32", "BF16")
"""dtypes of scales that the native kernels read"""


def grouped(
    kind: str,
    shape: Shape,
    scale: StoredTensor,
    *,
    group: int | None = None,
    block: tuple[int, int] | None = None,
    offsets: bool = False,
) -> Packing:
    """The packing of codes with scales for each group of a row, block, row or weight.

    Args:
        offsets: whether each group has one, as zero points make it.
        shape: of the weight or, fused, of those of all experts.
        scale: for which neither group nor block is given, one for each row or weight.
    """
    dtype = torch.bfloat16 if scale.dtype in ("BF16", "F8_E8M0") else torch.float32  # which hold each number
    if block is None:
        apart = group is not None or prod(scale.shape) > prod(shape[:-2])
        block = (1 if apart else ALL, ALL if group is None else group)
    return Packing(kind, block[1], block[0], dtype, has_offsets=offsets)


def offsets_of(zero: torch.Tensor, middle: int, scale: torch.Tensor) -> torch.Tensor:
    """What zero points add to a group's weights, as the native kernels read it.

    Args:
        zero: [out, groups] integers, unsigned.
        middle: the zero point that the kernels' own code of zero stands for.
        scale: [out, groups], or of fewer rows.
    """
    return in_panels(scale.to(torch.float32) * (middle - zero.to(torch.float32)))


def wrong_groups(order: torch.Tensor, groups: int) -> str | None:
    """What is wrong with the group of each column, if anything."""
    first, last = int(order.min()), int(order.max())
    return f"names groups {first} to {last} of {groups}" if first < 0 or last >= groups else None


def scaled(
    values: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | int = 0, order: torch.Tensor | None = None
) -> torch.Tensor:
    """``(values - zero) * scale`` in float32, where the columns are divided into groups.

    Args:
        values: [rows, columns] integers of up to 8 bits, or floats.
        scale: [rows, groups], or [1, 1] for all.
        zero: an integer, or integers of the scale's shape.
        order: int64 [columns] each one's group; None for groups of equal size, one after the other.
    """
    scale = scale.to(torch.float32)
    zeros = zero.to(torch.float32) if isinstance(zero, torch.Tensor) else None
    if order is not None:
        scale = scale.contiguous().index_select(1, order)
        zeros = zeros.contiguous().index_select(1, order) if zeros is not None else None
    rows, columns = values.shape
    groups = values.to(torch.float32).view(rows, scale.shape[1], -1)
    if zeros is not None:
        groups.sub_(zeros.unsqueeze(-1))
    elif zero:
        groups.sub_(zero)
    return groups.mul_(scale.unsqueeze(-1)).view(rows, columns)
