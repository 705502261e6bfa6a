"""What ``kt_debug`` adds to a forward: a log of each step, a check for NaN and Inf, a trace of the chosen experts, a summary.

Times are wall-clock times on the CPU. With a GPU, each begins by waiting for it, which makes a debugged chat slower.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import logging
import sys
import threading
import time
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import torch
from torch import nn

from ..ground.atomic_output import replacing, writing
from ..ground.errors import KTError
from .router_counts import PROMPT, phase

logger = logging.getLogger(__name__)


class NotFiniteError(RuntimeError):
    """The experts' input or output holds NaN or Inf."""


class Debugger:
    """Follows the calls of one model.

    Args:
        directory: gets ``steps.log`` (without it, steps go to stderr), ``experts.jsonl`` (a line a token and layer),
            ``trace_prompt.json`` and ``trace_answer.json`` (torch.profiler's, in Chrome's format, of the first step of each kind);
            None writes no files.
    """

    def __init__(self, directory: Path | None):
        self._lock = threading.Lock()
        self._local = threading.local()
        self._steps = 0
        self._total = {"experts": 0.0, "transfer": 0.0, "router": 0.0, "rest": 0.0}
        self._tokens = 0
        self._file: _Lines | None = None
        self._log: _Lines | None = None
        self._directory = directory
        self._profiled: set[str] = set()
        if directory is not None:
            with writing(directory):
                directory.mkdir(parents=True, exist_ok=True)
                self._file, self._log = _Lines(directory / "experts.jsonl"), _Lines(directory / "steps.log")
        reference = weakref.ref(self)
        atexit.register(lambda: debugger.close() if (debugger := reference()) else None)

    @contextlib.contextmanager
    def step(self, kwargs: dict[str, Any]) -> Iterator[None]:
        """Around ``model.forward(**kwargs)``."""
        self._local.layers, self._local.router = [], 0.0
        with self._profile("prompt" if phase(kwargs) == PROMPT else "answer"):
            started = time.perf_counter()
            yield
            self._end_step(time.perf_counter() - started)

    @contextlib.contextmanager
    def _profile(self, kind: str) -> Iterator[None]:
        with self._lock:
            if self._directory is None or kind in self._profiled:
                wanted = None
            else:
                wanted = self._directory / f"trace_{kind}.json"
                self._profiled.add(kind)
        if wanted is None:
            yield
            return
        with torch.profiler.profile() as profiler:  # in the thread that computes: it records no other
            yield
        try:
            with replacing(wanted) as temporary:
                profiler.export_chrome_trace(str(temporary))
        except KTError as error:
            logger.warning("kt_debug: %s", error)

    def _end_step(self, seconds: float) -> None:
        layers = self._local.layers
        parts = {key: sum(layer[key] for layer in layers) for key in ("experts", "transfer")}
        parts["router"] = self._local.router
        parts["rest"] = seconds - sum(parts.values())
        tokens = layers[0]["tokens"] if layers else 0
        with self._lock:
            self._steps += 1
            self._tokens += tokens
            step = self._steps
            for key, value in parts.items():
                self._total[key] += value
        lines = [
            f"DEBUG step {step}, layer {layer['layer']}: {layer['tokens']} tokens, transfer {1000 * layer['transfer']:.2f} ms, "
            f"experts {1000 * layer['experts']:.2f} ms"
            for layer in layers
        ]
        times = ", ".join(f"{key} {1000 * value:.2f}" for key, value in parts.items())
        lines.append(f"DEBUG step {step}: {tokens} tokens, {1000 * seconds:.2f} ms ({times})")
        if self._log:
            self._log.write("\n".join(lines) + "\n")
        else:
            print(*lines, sep="\n", file=sys.stderr)

    def watch_router(self, block: nn.Module) -> None:
        """Measure the router of a MoE block: its child ``gate`` or ``router``. What the block itself computes counts as rest."""
        for name, child in block.named_children():
            if name in ("gate", "router"):
                child.register_forward_pre_hook(self._before_router)
                child.register_forward_hook(self._after_router)

    def _before_router(self, module: nn.Module, args: Any) -> None:
        self._wait(args[0].device)
        self._local.began = time.perf_counter()

    def _after_router(self, module: nn.Module, args: Any, output: Any) -> None:
        self._wait(args[0].device)
        self._local.router = getattr(self._local, "router", 0.0) + time.perf_counter() - self._local.began

    def forward(self, layer: int, engine: Any, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> Any:
        """One layer's experts, measured, checked and traced; arguments and result are those of the experts module."""
        device = hidden.device
        self._wait(device)
        begun = time.perf_counter()
        x, chosen, scores = hidden.cpu(), index.cpu(), weights.cpu()
        moved = time.perf_counter()
        _check(layer, "the input of the experts", x, chosen)
        _check(layer, "the routing weights", scores, chosen)
        called = time.perf_counter()
        out = engine.forward(x, chosen, scores)
        done = time.perf_counter()
        if not bool(out.isfinite().all()):
            _find_expert(layer, engine, x, chosen)
            _check(layer, "the sum of the experts", out, chosen)
        returned = time.perf_counter()
        result = out.to(device)
        self._wait(device)
        transfer = (moved - begun) + (time.perf_counter() - returned)
        getattr(self._local, "layers", []).append(
            {"layer": layer, "tokens": len(x), "transfer": transfer, "experts": done - called}
        )
        if self._file is not None:
            self._trace(layer, chosen, scores)
        return result

    @staticmethod
    def _wait(device: torch.device) -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    def _trace(self, layer: int, index: torch.Tensor, weights: torch.Tensor) -> None:
        with self._lock:
            assert self._file is not None
            for token, (experts, scores) in enumerate(zip(index.tolist(), weights.float().tolist(), strict=True)):
                line = {"step": self._steps + 1, "layer": layer, "token": token, "experts": experts}
                self._file.write(json.dumps({**line, "weights": [round(score, 6) for score in scores]}) + "\n")

    def summary(self) -> str:
        """Where the time went, in one line."""
        total = sum(self._total.values())
        parts = ", ".join(f"{key} {value:.2f} s ({value / total:.0%})" for key, value in self._total.items() if total)
        return f"DEBUG profile: {self._steps} steps, {self._tokens} tokens, {total:.2f} s: {parts}"

    def close(self) -> None:
        """Log the summary and close the files; happens by itself at the end of the process."""
        if self._steps:
            logger.info("%s", self.summary())
        if self._file is not None:
            assert self._log is not None
            self._file.close()
            self._log.close()
            self._file = self._log = None
        self._steps = 0


class _Lines:
    """A file of lines that a chat writes beside its answers. If it cannot be written, the chat goes on without it.

    Raises:
        OSError: It cannot be opened.
    """

    def __init__(self, path: Path):
        self._path = path
        self._file: IO[str] | None = path.open("w", encoding="utf-8")

    def write(self, text: str) -> None:
        if self._file is not None:
            try:
                self._file.write(text)
            except OSError as error:
                self._end(error)

    def close(self) -> None:
        if self._file is not None:
            try:
                self._file.close()
            except OSError as error:
                self._end(error)

    def _end(self, error: OSError) -> None:
        logger.warning("kt_debug: %s is not complete, nothing more is written to it (%s).", self._path, error.strerror)
        file, self._file = self._file, None
        with contextlib.suppress(OSError):
            if file is not None:
                file.close()


def _check(layer: int, what: str, tensor: torch.Tensor, index: torch.Tensor) -> None:
    finite = tensor.isfinite().all(-1)
    if not bool(finite.all()):
        token = int((~finite).nonzero()[0, 0])
        value = tensor[token][~tensor[token].isfinite()][0].item()
        raise NotFiniteError(
            f"layer {layer}: {value} in {what}, first at token {token} of {len(tensor)}, which is routed to experts "
            f"{', '.join(map(str, index[token].tolist()))}."
        )


def _find_expert(layer: int, engine: Any, x: torch.Tensor, index: torch.Tensor) -> None:
    """Compute token by token and expert by expert until one is not finite."""
    first = torch.zeros(1, index.shape[1])
    first[0, 0] = 1
    for token, row in enumerate(index.tolist()):
        for expert in row:
            out = engine.forward(x[token : token + 1], torch.full((1, len(row)), expert), first)
            if not bool(out.isfinite().all()):
                value = out[~out.isfinite()][0].item()
                raise NotFiniteError(
                    f"layer {layer}, expert {expert}: {value} in its output, first at token {token} of {len(x)}."
                )
