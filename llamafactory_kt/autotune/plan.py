"""The plans among which a load chooses: those of the engine that was asked for, or of all that ``auto`` considers."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from ..checkpoint.formula import ExpertFormula
from ..engines.base import Engine
from ..engines.plan import Plan, PlanRequest
from ..engines.registry import engines, find_engine
from ..ground.errors import KTKernelError

logger = logging.getLogger(__name__)


def candidates(
    backend: str, request: PlanRequest, *, merged: bool = False, formulas: Sequence[ExpertFormula] = ()
) -> list[Plan]:
    """The plans that fit the request and this machine; the first is used where nothing is measured.

    With ``auto``, a number of threads that was asked for means an engine with workers, where one runs.

    Args:
        backend: a value of ``kt_backend``.
        merged: the adapter is merged into the weights, so that ``auto`` may choose an engine that computes no LoRA.
        formulas: what the model's experts compute; none where the model is not known yet.

    Raises:
        KTConfigError: The backend is unknown, or threads and sub-pools do not fit the machine.
        KTKernelError: The engine that was asked for cannot run here, or cannot compute the model's experts.
    """
    engine = find_engine(backend)
    if engine is not None:
        if problem := engine.problem():
            raise KTKernelError(
                f"kt_backend: {engine.name} cannot run here: {problem}. kt_backend: auto takes the fastest engine that can."
            )
        if request.shared and not engine.shares:
            able = ", ".join(each.name for each in engines() if each.shares)
            raise KTKernelError(
                f"kt_gpu_experts: {engine.name} cannot leave experts to the GPU; set kt_backend to one of {able}, or remove kt_gpu_experts."
            )
        if problem := _cannot_compute(engine, formulas):
            raise KTKernelError(
                f"kt_backend: {engine.name} cannot compute the experts of this model: {problem}. kt_backend: auto takes the fastest "
                "engine that can."
            )
        chosen = [engine]
    else:
        chosen = _considered(request, merged, formulas)
    if request.num_threads and not any(each.has_workers for each in chosen):
        logger.warning(
            "kt_num_threads: %d does nothing here: torch's threads compute the experts.", request.num_threads
        )
    return [plan for each in chosen for plan in each.plans(request)]


def _cannot_compute(engine: type[Engine], formulas: Sequence[ExpertFormula]) -> str | None:
    problems = ((formula, engine.cannot_compute(formula)) for formula in formulas)
    return next((f"they are {formula}, and {problem}" for formula, problem in problems if problem), None)


def _considered(request: PlanRequest, merged: bool, formulas: Sequence[ExpertFormula]) -> list[type[Engine]]:
    able = [each for each in engines() if not _cannot_compute(each, formulas) and (each.shares or not request.shared)]
    wanted = [engine for engine in able if engine.auto(merged)]
    running = [engine for engine in wanted if engine.problem() is None]
    with_workers = [engine for engine in running if engine.has_workers]
    if request.num_threads and with_workers:
        return with_workers
    if running:
        return running
    logger.warning(
        "kt_backend: auto falls back to plain torch, which is slow: %s.",
        "; ".join(str(engine.problem()) for engine in wanted),
    )
    return [engine for engine in able if engine.fallback]


def left_out(backend: str, *, merged: bool = False, formulas: Sequence[ExpertFormula] = ()) -> str:
    """Which engine ``auto`` would have considered, had it run here, and why it does not; empty if none, or without ``auto``."""
    if find_engine(backend) is not None:
        return ""
    able = (engine for engine in engines() if engine.auto(merged) and not _cannot_compute(engine, formulas))
    problems = ((engine, engine.problem()) for engine in able)
    return next((f"{engine.name} cannot run: {problem}" for engine, problem in problems if problem), "")
