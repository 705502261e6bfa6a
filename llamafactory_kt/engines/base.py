"""The interface of engines. An engine is a subclass of :class:`Engine` that is registered (:mod:`.registry`).

An engine says by itself all that others need to know of it: its name, whether it runs here, its plans, its memory, how exact
it is. Nothing outside of ``engines/`` compares engine names.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import ClassVar, Protocol

import torch

from ..adapters import ExpertLora, ExpertsShape
from ..checkpoint.formula import PLAIN, ExpertFormula
from .bounds import Bounds
from .options import DEFAULT_OPTIONS, EngineOptions, EngineSpec, LayerMemory, ReadExperts
from .plan import Plan, PlanRequest
from .product import Product

Undo = Callable[[], None]
"""Puts back what was there before."""


class Stream(Protocol):
    """What engines use of ``torch.cuda.Stream``."""

    cuda_stream: int
    device: torch.device

    @property
    def capturing(self) -> bool:
        """Whether a CUDA graph is being captured."""


class Engine(ABC):
    """One layer's experts. Weights and LoRA are plain tensors outside any module: ``model.to()`` never moves them.

    The class attributes and class methods describe the engine; their defaults fit one that computes with PyTorch's threads on the
    checkpoint's own weights.
    """

    name: ClassVar[str]
    """as ``kt_backend`` spells it"""
    aliases: ClassVar[tuple[str, ...]] = ()
    """other spellings; letter case never matters"""
    bounds: ClassVar[Bounds] = Bounds()
    """what ``verify`` accepts"""
    computes_lora: ClassVar[bool] = True
    """computes LoRA beside the weights; otherwise the adapter is merged into them while they are loaded"""
    has_workers: ClassVar[bool] = False
    """computes in worker threads of its own, whose number ``kt_num_threads`` sets"""
    weights_dtype: ClassVar[torch.dtype | None] = None
    """floating-point dtype that all weights are converted to; None keeps the checkpoint's, or packs integers"""
    bits: ClassVar[int | None] = None
    """of a weight in memory; None for the checkpoint's own"""
    reads_packed_files: ClassVar[bool] = False
    """can read ``kt_weight_path``"""
    needs_packed_files: ClassVar[bool] = False
    """cannot run without ``kt_weight_path``"""
    maps_packed_files: ClassVar[bool] = False
    """can leave the weights of ``kt_weight_path`` in its mapped files"""
    maps_weights: ClassVar[bool] = False
    """can read weights in the checkpoint's mapped files, row by row"""
    takes_packed: ClassVar[bool] = False
    """loads what :attr:`EngineSpec.read_packed` reads, where it reads anything"""
    shares: ClassVar[bool] = False
    """leaves out the experts whose index is negative (:meth:`forward`), and hands out what it computes with (:meth:`product`), so that a
    GPU can compute some"""
    notes_calls: ClassVar[bool] = False
    """notes each call of :meth:`forward` for whoever records (:mod:`..native.recording`), so that it can be made again"""
    fallback: ClassVar[bool] = False
    """``auto`` takes it only where no other engine runs"""

    def __init__(self, spec: EngineSpec, read_experts: ReadExperts, options: EngineOptions = DEFAULT_OPTIONS):
        self.spec, self.options = spec, options
        self.lora_rank = 0
        """rank of the LoRA in place, 0 for none; :meth:`set_lora` keeps it true"""
        self.read_experts = read_experts

    @classmethod
    def problem(cls) -> str | None:
        """Why the engine cannot run here, or None. Never raises."""
        return None

    @classmethod
    def cannot_compute(cls, formula: ExpertFormula) -> str | None:
        """Why the engine cannot compute such experts, or None. An engine that can do more than ``down(silu(gate x) * up x)`` says so
        here; it is never given anything else."""
        return None if formula == PLAIN else f"it computes {PLAIN} alone"

    @classmethod
    def auto(cls, merged: bool) -> bool:
        """Whether ``auto`` considers the engine where it runs.

        Args:
            merged: the adapter is merged into the weights, so that the engine need not compute LoRA.
        """
        return False

    @classmethod
    def merges(cls, wanted: bool) -> bool:
        """Whether adapters are merged into the weights: on request, or because the engine computes no LoRA."""
        return wanted or not cls.computes_lora

    @classmethod
    def plans(cls, request: PlanRequest) -> list[Plan]:
        """The thread settings worth measuring; the first is used where nothing is measured.

        Raises:
            KTConfigError: The request does not fit this machine.
        """
        return [Plan(cls.name, 0, request.all_torch_threads)]

    @classmethod
    def memory(cls, shape: ExpertsShape, rank: int, itemsize: float, options: EngineOptions) -> LayerMemory:
        """What a layer takes.

        Args:
            rank: of the LoRA to come, 0 for none.
            itemsize: bytes of a weight as it is read from the checkpoint.
        """
        weights, sizes = int(shape.num_weights * itemsize), shape.hidden_size + shape.intermediate_size
        return LayerMemory(weights, 3 * shape.num_experts * rank * sizes * 2, weights)

    @classmethod
    def build(cls) -> str:
        """Which build of the engine runs here, for the load table; empty where there is one only."""
        return ""

    @classmethod
    def describe_workers(cls, plan: Plan, options: EngineOptions) -> str:
        """The engine's own threads, for the load table; empty where it has none."""
        return ""

    @classmethod
    def measured_as(cls) -> type[Engine]:
        """The engine that is measured in this one's place, with weights made on the spot."""
        return cls

    @classmethod
    def start(cls, plan: Plan, options: EngineOptions) -> tuple[Plan, EngineOptions]:
        """Start what the engine needs once in a process, before it is built for the first layer.

        Returns:
            Plan and options in force, where the process has settled them already.
        """
        return plan, options

    @classmethod
    def arrange_process(cls, plan: Plan) -> None:
        """Let the threads of this process run as planned from now on."""
        torch.set_num_threads(plan.torch_threads)

    @abstractmethod
    def load(self) -> None:
        """Read the base weights."""

    @abstractmethod
    def set_lora(self, lora: ExpertLora | None) -> Undo:
        """Replace the LoRA, of any rank; None for the base alone. If this fails, the old one stays in place.

        Returns:
            A call that puts the old one back, whatever is in place then, as often and for as long as it is kept.
        """

    @abstractmethod
    def forward(self, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """``sum_k weights[t, k] * expert[index[t, k]](hidden[t])``, where an expert computes the spec's formula.

        Args:
            hidden: [T, H], any floating dtype, CPU.
            index: [T, K] int64, CPU. Where the engine :attr:`shares`, ``~e`` leaves expert ``e`` out.
            weights: [T, K], any floating dtype, CPU.

        Returns:
            [T, H] in the dtype of ``hidden``.
        """

    def product(self, projection: str, expert: int) -> Product:
        """What one of the shape's projections of an expert is, LoRA included."""
        raise NotImplementedError(f"{self.name} does not hand out its weights")

    @property
    def holds_packed(self) -> bool:
        """Whether the weights are what :attr:`EngineSpec.read_packed` read."""
        return False

    @property
    def streams(self) -> bool:
        """Whether a GPU's stream can wait for this engine (:meth:`on_stream`), so that no thread of Python's has to."""
        return False

    @property
    def captures(self) -> bool:
        """Whether a CUDA graph can hold the calls of :meth:`on_stream`: it makes them again, with the LoRA that is in place then."""
        return False

    def stream_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """The dtype that :meth:`on_stream` computes tokens of a dtype in."""
        return torch.bfloat16

    @property
    def stream_hidden_size(self) -> int:
        """Columns of ``x`` and ``out`` of :meth:`on_stream`: the hidden size, padded with zeros."""
        return self.spec.shape.hidden_size

    def on_stream(
        self, stream: Stream, x: torch.Tensor, index: torch.Tensor, scores: torch.Tensor, out: torch.Tensor
    ) -> AbstractContextManager[None]:
        """Compute once the stream has come this far. What the block queues runs meanwhile; at its end the stream waits for
        ``out``. All tensors lie on the CPU, and must stay there until the stream has passed the end; for a stream that captures, as long
        as the graph may run.

        Args:
            x: [T, :attr:`stream_hidden_size`] of :meth:`stream_dtype`; ``out`` is like it.
            index: [T, K] int64.
            scores: [T, K] float32.
        """
        raise NotImplementedError(f"{self.name} does not work on a stream")

    def nbytes_for_rank(self, rank: int) -> int:
        """Memory beyond the present that a LoRA of this rank makes the base weights take."""
        return 0

    @property
    @abstractmethod
    def nbytes(self) -> int:
        """Memory of the base weights."""

    @property
    @abstractmethod
    def lora_nbytes(self) -> int:
        """Memory of the LoRA tensors."""
