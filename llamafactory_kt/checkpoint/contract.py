"""What a class of experts computes, learnt from its own forward on small weights. Names and attributes of a model decide nothing.

With ``down`` the identity, one input and weights in its column alone, the forward is a function of one number of gate and one of
up. Its values tell activation, limit and offset. Then it runs on random weights, and has to agree with what was learnt.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator
from copy import copy
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import nn

from ..adapters import ExpertsShape
from ..adapters.fused_layout import FusedLayout
from .formula import ACTIVATIONS, ExpertFormula

_SIZES = ("hidden_dim", "hidden_size"), ("intermediate_dim", "intermediate_size", "expert_dim")
"""attributes with the hidden and the intermediate size, on which a forward may rely"""
_NEAR = 0.125
"""where no activation is limited"""
_FAR = 1e6
"""where all limits show"""
_GRID = (-_FAR, -1e3, -30.0, -8.0, -3.0, -1.0, -_NEAR, 0.0, _NEAR, 1.0, 3.0, 8.0, 30.0, 1e3, _FAR)


class OutsideContract(Exception):
    """Experts that are not understood; the text completes a sentence that names them."""


@dataclass(frozen=True)
class Contract:
    """What is known of one module of experts."""

    shape: ExpertsShape
    formula: ExpertFormula
    presorted: bool
    """called as ``experts(hidden_states [E * T, H])``, all tokens for each expert, multiplied with the routers' weights before,
    which are zero for most (Llama-4); otherwise as ``experts(hidden_states [T, H], top_k_index, top_k_weights [T, K])``"""


@dataclass(frozen=True)
class _Weights:
    """Of experts small enough to try: gate and up [E, I, H], down [E, H, I], float64; bias of each product or None."""

    gate: torch.Tensor
    up: torch.Tensor
    down: torch.Tensor
    biases: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None
    """gate and up [E, I], down [E, H]"""


def read_contract(module: nn.Module) -> Contract:
    """Learn what an experts module computes; it may be on the meta device.

    Raises:
        OutsideContract: It is not understood.
    """
    names = {name for name, _ in module.named_parameters()}
    has_gate, has_biases = "gate_up_proj" in names, "down_proj_bias" in names
    first = "gate_up_proj" if has_gate else "up_proj"
    known = {first, "down_proj"} | ({f"{first}_bias", "down_proj_bias"} if has_biases else set())
    if not known <= names:
        raise OutsideContract("their weights are not named gate_up_proj (or up_proj) and down_proj")
    if unknown := sorted(names - known):
        raise OutsideContract(f"they have weights that the contract does not know: {', '.join(unknown)}")
    up, down = (tuple(getattr(module, name).shape) for name in (first, "down_proj"))
    presorted = len(inspect.signature(own_forward(module)).parameters) == 2  # self, hidden_states
    if presorted and has_biases:  # which would make something of the rows of zeros
        raise OutsideContract("they have biases, and get rows of tokens that did not choose them")
    reason = f"{first} {up} does not go with down_proj {down}"
    for shape in _shapes(up, down, has_gate):
        try:
            with torch.device("cpu"):  # the model may be under construction on another
                formula = _Trial(module, shape, has_biases, presorted).formula()
        except Exception as error:  # anything: the forward may need what the contract does not promise
            reason = f"their forward needs more than the contract gives ({type(error).__name__}: {error})"
            continue
        if formula is not None:
            return Contract(shape, formula, presorted)
        reason = "they do not compute down(f(gate x) * up x) with an f that is known here"
    raise OutsideContract(reason)


def _shapes(up: tuple[int, ...], down: tuple[int, ...], has_gate: bool) -> Iterator[ExpertsShape]:
    """What stored sizes may mean."""
    if len(up) != 3 or len(down) != 3:
        return
    for transposed, interleaved in product((False, True), (False, True) if has_gate else (False,)):
        layout = FusedLayout(transposed, interleaved)
        hidden, intermediate = layout.stored(*down[1:])
        if up == (down[0], *layout.stored((1 + has_gate) * intermediate, hidden)):
            yield ExpertsShape(down[0], hidden, intermediate, has_gate, layout)


def own_forward(module: nn.Module) -> Any:
    """The class's own forward, without the choice of another implementation that transformers wraps around it."""
    return inspect.unwrap(type(module).forward)


class _Trial:
    """Runs a module's forward on weights of a small size, stored in one layout."""

    def __init__(self, module: nn.Module, shape: ExpertsShape, has_biases: bool, presorted: bool):
        self.shape = shape
        self._module, self._has_biases, self._presorted = module, has_biases, presorted

    def formula(self) -> ExpertFormula | None:
        """What the module computes, if it is stored in this layout; None if it is no formula that is known."""
        formula = self._measured()
        return formula if formula is not None and self._agrees(formula) else None

    def _measured(self) -> ExpertFormula | None:
        """From what one number of gate and one of up give: a(g) * (clamp(u, limit) + offset)."""
        none, near, far = self._values([_NEAR] * 3, [0.0, _NEAR, _FAR]).tolist()
        if not self.shape.has_gate:
            return self._named(near)
        slope = (near - none) / _NEAR
        if not slope:
            return None
        offset, limit = none / slope, (far - none) / slope
        return self._named(slope, limit=_plain(limit) if limit < _FAR / 2 else None, up_offset=_plain(offset))

    def _named(self, value: float, limit: float | None = None, up_offset: float = 0.0) -> ExpertFormula | None:
        """The formula whose activation of :data:`_NEAR` is ``value``, where the whole grid agrees."""
        gate, up = [g for g in _GRID for _ in _GRID], [u for _ in _GRID for u in _GRID]
        found, shape = self._values(gate, up), self.shape
        share = value / _NEAR
        for name, limit_activated in product(ACTIVATIONS, (False, True)[: 1 if limit is None else 2]):
            alpha = _plain(math.log(share / (1 - share)) / _NEAR) if name == "silu" and 0 < share < 1 else 1.0
            formula = ExpertFormula(name, shape.has_gate, alpha, limit, limit_activated, up_offset, self._has_biases)
            if _close(found, formula.activate(_numbers(gate), _numbers(up))):
                return formula
        return None

    def _values(self, gate: list[float], up: list[float]) -> torch.Tensor:
        """The function of numbers of gate and of up, [N]."""
        size = len(gate)
        unit = torch.eye(size, dtype=torch.float64)
        columns = [(_numbers(values)[:, None] * unit[:1])[None] for values in (gate, up)]
        biases = (torch.zeros(1, size, dtype=torch.float64),) * 3 if self._has_biases else None
        weights = _Weights(columns[0], columns[1], unit[None], biases)
        return self._run(weights, unit[:1], torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1).double())[0]

    def _agrees(self, formula: ExpertFormula) -> bool:
        """Whether several experts on random weights compute the formula."""
        experts, hidden, intermediate, tokens = 3, 8, 4, 5
        generator = torch.Generator().manual_seed(0)

        def random(*shape: int) -> torch.Tensor:
            return 3 * torch.randn(*shape, generator=generator, dtype=torch.float64)

        sizes = (intermediate, hidden), (intermediate, hidden), (hidden, intermediate)
        gate, up, down = (random(experts, *size) for size in sizes)
        biases = tuple(random(experts, out) for out, _ in sizes) if self._has_biases else None
        x, scores = random(tokens, hidden), random(tokens, 2).abs()
        index = (torch.arange(tokens)[:, None] + torch.arange(2)) % experts
        if self._presorted:  # each expert has rows of its own, and nothing is summed
            x, scores, index = random(experts * tokens, hidden), torch.ones(experts * tokens, 1), torch.arange(experts)
            index = index.repeat_interleave(tokens)[:, None]
        found = self._run(_Weights(gate, up, down, biases), x, index, scores)  # type: ignore[arg-type]
        each = [(weight[index] @ x[:, None, :, None])[..., 0] for weight in (gate, up)]
        if biases is not None:
            each = [value + bias[index] for value, bias in zip(each, biases, strict=False)]
        outs = (down[index] @ formula.activate(*each)[..., None])[..., 0]
        if biases is not None:
            outs = outs + biases[2][index]
        return _close(found, (scores[..., None] * outs).sum(1))

    def _run(self, weights: _Weights, x: torch.Tensor, index: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """[T, H]; for presorted experts the rows lie as they expect them, and index and scores are not given."""
        layout, (experts, hidden, intermediate) = self.shape.fused, weights.down.shape
        first = "gate_up_proj" if self.shape.has_gate else "up_proj"
        up = layout.join(weights.gate, weights.up, 1) if self.shape.has_gate else weights.up
        stored = {first: up, "down_proj": weights.down}
        if layout.transposed:
            stored = {name: weight.transpose(1, 2) for name, weight in stored.items()}
        if weights.biases is not None:
            gate, up, down = weights.biases
            stored[f"{first}_bias"] = layout.join(gate, up, 1) if self.shape.has_gate else up
            stored["down_proj_bias"] = down
        tiny = copy(self._module)
        tiny._parameters = {name: nn.Parameter(tensor.contiguous(), False) for name, tensor in stored.items()}
        tiny.num_experts = experts  # type: ignore[assignment]
        for attributes, size in zip(_SIZES, (hidden, intermediate), strict=True):
            for name in attributes:
                if hasattr(tiny, name):
                    setattr(tiny, name, size)
        with torch.no_grad():
            found: torch.Tensor = own_forward(tiny)(tiny, x, *(() if self._presorted else (index, scores)))
        return found.double()


def _numbers(values: list[float]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def _plain(value: float) -> float:
    """A number measured with rounding errors, as somebody would have written it."""
    plain = float(f"{value:.5g}")
    return plain if abs(plain - value) <= 1e-5 * max(1.0, abs(value)) else value


def _close(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    return torch.allclose(found, wanted, rtol=1e-5, atol=1e-5)
