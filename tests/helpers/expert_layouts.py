"""LoRA of a layer's experts, and the names and tensors that trainers write for it.

Each function gets projection -> A [E, r, in] and B [E, out, r], and gives the names after ``experts`` with their tensors.
"""

from __future__ import annotations

import re

import torch

_PEFT = re.compile(r"(?P<module>.*\.layers\.\d+\..*experts)(?:\.base_layer)*\.lora_A\.weight")


def each_projection(projections):
    for name, (a, b) in projections.items():
        yield from ((f"{name}_proj.lora_A", a), (f"{name}_proj.lora_B", b))


def each_expert(projections):
    for name, tensor in each_projection(projections):
        yield from ((f"{expert}.{name}", own) for expert, own in enumerate(tensor))


def gate_up(projections):
    """A of gate and up, which have one, and the rows of both B."""
    return projections["gate"][0], torch.cat([projections["gate"][1], projections["up"][1]], 1)


def fused_projections(projections):
    fused = {"gate_up": gate_up(projections)} if "gate" in projections else {}
    yield from each_projection(fused | {name: pair for name, pair in projections.items() if name == "down"})


def renamed(tensors, rename, experts, hidden):
    """An adapter's tensors, those of PEFT's ``target_parameters`` on experts as ``rename`` gives them."""
    rest, layers = dict(tensors), {}
    for name in filter(_PEFT.fullmatch, tensors):
        a = rest.pop(name).unflatten(0, (experts, -1))
        b = rest.pop(name.replace("lora_A", "lora_B")).unflatten(1, (-1, experts)).permute(2, 0, 1)
        width = ({a.shape[2], b.shape[1]} - {hidden}).pop()  # 2 I or I, both larger than H here
        down = width < 2 * hidden
        if a.shape[2] != (width if down else hidden):  # PEFT 0.18: the LoRA of the transposed weight
            a, b = b.transpose(1, 2), a.transpose(1, 2)
        found = (
            {"down": (a, b)} if down else {n: (a, half) for n, half in zip(("gate", "up"), b.chunk(2, 1), strict=True)}
        )
        layers.setdefault(_PEFT.fullmatch(name)["module"], {}).update(found)
    for module, projections in layers.items():
        rest |= {f"{module}.{name}.weight": tensor.contiguous().clone() for name, tensor in rename(projections)}
    return rest
