"""How kt-kernel's kernels pack weights, and which sizes they take (measured with 0.7.2)."""

from __future__ import annotations

from dataclasses import dataclass

from ...adapters import ExpertsShape


@dataclass(frozen=True)
class Method:
    """One of kt-kernel's kernels."""

    name: str
    """as ``kt_backend`` spells it"""
    bits: int
    """of a packed weight"""
    multiple: int
    """hidden and intermediate size (per sub-pool) must be multiples of this: BF16 crashes the process otherwise, the
    others fail when they are built"""
    packer: str = ""
    """kt-kernel's class that packs weights into ``.kt`` files; empty where there is none"""

    @property
    def short(self) -> str:
        """As kt-kernel's file names have it: ``INT8``."""
        return self.name.removeprefix("AMX")

    @property
    def sft(self) -> str:
        """kt-kernel's name of an SFT method."""
        return f"{self.name}_SFT"

    def padded(self, size: int, pools: int = 1) -> int:
        """``size`` rounded up; zeros in the padding leave the result unchanged, exactly."""
        multiple = self.multiple * pools
        return -(-size // multiple) * multiple

    def nbytes(self, rows: int, columns: int) -> int:
        """Memory of one packed matrix; integers have one float32 scale a row."""
        return rows * columns * self.bits // 8 + (4 * rows if self.bits < 16 else 0)


@dataclass(frozen=True)
class PackedShape:
    """The packed base weights of one layer; sizes are padded."""

    method: Method
    num_experts: int
    hidden: int
    intermediate: int
    pools: int
    """NUMA sub-pools, over which the intermediate size is divided"""

    @classmethod
    def of(cls, method: Method, shape: ExpertsShape, pools: int) -> PackedShape:
        hidden, intermediate = method.padded(shape.hidden_size), method.padded(shape.intermediate_size, pools)
        return cls(method, shape.num_experts, hidden, intermediate, pools)

    @property
    def matrices(self) -> tuple[tuple[int, int], ...]:
        """Rows and columns of an expert's gate, up and down in one sub-pool."""
        share = self.intermediate // self.pools
        return (share, self.hidden), (share, self.hidden), (self.hidden, share)

    @property
    def nbytes(self) -> int:
        """Memory of them all."""
        return self.num_experts * self.pools * sum(self.method.nbytes(*matrix) for matrix in self.matrices)
