"""The results of an estimate. Sizes in bytes; rates per second."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from .speed import MachineSpeed

CONTEXTS = 128, 1024, 8192
"""tokens in the cache before the token whose speed is estimated; the memory of the cache is that of the last"""
PROMPT = 1024
"""tokens of the prompt whose speed is estimated"""


@dataclass(frozen=True)
class EstimatedModel:
    """What is the same in all rows."""

    name: str
    architecture: str
    layers: int
    expert_layers: int
    experts: int
    """of a layer"""
    experts_per_token: int
    parameters: int
    stored: str
    """how the checkpoint has its experts; empty where config.json alone is known, and says nothing of quantization"""
    disk: int
    disk_is_measured: bool
    """whether the files are there; otherwise it is what config.json says"""
    adapter: str | None


@dataclass(frozen=True)
class Row:
    """One choice of precisions, on the CPU alone or with a GPU that has everything but the routed experts."""

    on_gpu: bool
    kt_backend: str
    kt_dense: str
    kt_cache: str
    experts: int
    dense: int
    """everything else"""
    lora: int
    """of the adapter, experts' part and PEFT's"""
    cache: int
    cpu: int
    """memory in all, the process's own included"""
    gpu: int
    loading: int
    """CPU memory on top while weights are loaded"""
    fits: bool
    """into the memory that is free, of the CPU and, where there are any, of the GPUs"""
    bytes_per_token: dict[int, int]
    """tokens before it -> bytes that a token reads of the CPU's memory"""
    tokens_per_second: dict[int, float]
    """tokens before it -> speed of a token"""
    prompt_tokens_per_second: float


@dataclass(frozen=True)
class Estimate:
    """What ``llamafactory-kt estimate`` says."""

    model: EstimatedModel
    machine: MachineSpeed
    memory: int
    """of this machine, within its cgroup's limit"""
    free: int
    """of the above"""
    gpu_free: int | None
    """of all GPUs together; None without one"""
    rows: list[Row]

    def best(self, on_gpu: bool) -> Row | None:
        """The fastest row that fits, with the highest precision among those that are as fast."""
        fitting = [row for row in self.rows if row.fits and row.on_gpu == on_gpu]
        return max(fitting, key=lambda row: row.tokens_per_second[CONTEXTS[1]], default=None)

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)
