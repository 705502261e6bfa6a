"""Whatever shows a packed weight keeps its memory, and reads the same values, after the model is gone. Where that was not so, the process
ended with SIGSEGV."""

from __future__ import annotations

import copy
import gc
import io
import pickle

import pytest
import torch
from helpers.marks import needs_bfloat16_kernels
from torch import nn
from torch.nn import functional as F

from llamafactory_kt.decoding import prepare
from llamafactory_kt.decoding.prepare import prepare_layers
from llamafactory_kt.ground.paging import are_of_a_file
from llamafactory_kt.matmul.layouts import is_packed, unpack
from llamafactory_kt.matmul.linear import linear
from llamafactory_kt.matmul.packed_weight import PackedWeight

pytestmark = needs_bfloat16_kernels
SIZE = 1536, 1024


def layers(device: str = "cpu") -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(
        *(nn.Linear(*SIZE[::-1], bias=False, dtype=torch.bfloat16, device=device) for _ in range(4))
    ).requires_grad_(False)


@pytest.fixture(autouse=True)
def packed_whatever_is_faster(monkeypatch):
    monkeypatch.setattr(prepare, "faster_packed", lambda sizes, sample: set(sizes))


def of_state_dict_with_assign(model: nn.Module) -> torch.Tensor:
    other = layers("meta")
    other.load_state_dict(model.state_dict(), assign=True)
    return other[1].weight


ALIASES = {
    "detach": lambda model: model[1].weight.detach(),
    "data": lambda model: model[1].weight.data,
    "state_dict": lambda model: model.state_dict()["1.weight"],
    "keep_vars": lambda model: model.state_dict(keep_vars=True)["1.weight"],
    "Parameter": lambda model: nn.Parameter(model[1].weight, requires_grad=False),
    "Parameter of data": lambda model: nn.Parameter(model[1].weight.data, requires_grad=False),
    "buffer": lambda model: nn.Buffer(model[1].weight.detach()),
    "assign": of_state_dict_with_assign,
    "alias": lambda model: torch.ops.aten.alias(model[1].weight),
    "view": lambda model: model[1].weight.view_as(model[1].weight),
    "inference": torch.inference_mode()(lambda model: model[1].weight.detach()),
    "deepcopy": lambda model: copy.deepcopy(model)[1].weight,
    "copy": lambda model: copy.copy(model[1].weight),
    "pickle": lambda model: pickle.loads(pickle.dumps(model[1].weight)),
    "clone": lambda model: model[1].weight.clone(),
    "parameters": lambda model: list(model.parameters())[1],
    "closure": lambda model: (lambda weight: lambda: weight)(model[1].weight.detach())(),
}


@pytest.mark.parametrize("way", ALIASES)
def test_aliases_outlive_the_model(way):
    model = layers()
    wanted = model[1].weight.clone()
    prepare_layers(model)
    assert isinstance(model[1].weight, PackedWeight) and isinstance(model[1].weight, nn.Parameter)
    alias = ALIASES[way](model)
    del model
    gc.collect()
    filler = [torch.full(SIZE, 7.0, dtype=torch.bfloat16) for _ in range(30)]
    x = torch.randn(3, SIZE[1]).bfloat16()
    assert torch.equal((unpack(alias) if is_packed(alias) else alias).detach(), wanted)
    assert torch.equal(alias.float(), wanted.float()) and len(filler) == 30
    for product in (linear, F.linear):
        torch.testing.assert_close(product(x, alias).float(), x.float() @ wanted.float().T, atol=0.5, rtol=0.02)


@pytest.fixture
def packed() -> nn.Parameter:
    model = layers()
    prepare_layers(model)
    return model[1].weight


def test_nothing_changes_it_and_nothing_gets_an_address(packed):
    before = packed.to_dense()
    for change in (
        lambda: packed.data.add_(1),
        lambda: packed.copy_(before),
        lambda: packed.__setitem__(0, 1),
        lambda: torch.add(before, before, out=packed.data),
        lambda: torch._foreach_mul_([packed.data], 2),
        lambda: setattr(packed, "data", before),
    ):
        with pytest.raises(RuntimeError, match="cannot be changed in place"):
            change()
    for address in (
        lambda: packed.data_ptr(),
        lambda: packed.untyped_storage(),
        lambda: packed.share_memory_(),
        lambda: torch.utils.dlpack.to_dlpack(packed.detach()),
        lambda: packed.detach().numpy(),
        lambda: setattr(nn.Parameter(torch.empty(0)), "data", packed.detach()),
    ):
        with pytest.raises((RuntimeError, NotImplementedError)):
            address()
    assert torch.equal(packed.to_dense(), before)


def test_it_is_saved_and_converted_as_the_plain_weight(packed):
    plain, file = packed.to_dense(), io.BytesIO()
    torch.save({"weight": packed}, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=True)["weight"], plain)
    layer = nn.Linear(*SIZE[::-1], bias=False, dtype=torch.bfloat16)
    layer.load_state_dict({"weight": packed})
    assert torch.equal(layer.weight, plain)
    layer.weight = packed
    assert torch.equal(layer.float().weight, plain.float())


def test_data_may_be_exchanged(packed):
    model = layers()
    prepare_layers(model)
    packed.data = model[2].weight.data
    wanted = model[2].weight.to_dense()
    del model
    gc.collect()
    assert torch.equal(packed.to_dense(), wanted) and torch.equal(
        linear(torch.eye(SIZE[1]).bfloat16(), packed).T, wanted
    )


def test_a_plain_weight_that_is_shown_elsewhere_keeps_its_values():
    """Its pages were dropped after it had been packed, which only those of a file survive."""
    model = layers()
    kept = model.state_dict()
    wanted = {name: value.clone() for name, value in kept.items()}
    prepare_layers(model)
    assert all(torch.equal(kept[name], wanted[name]) for name in wanted)


def test_which_pages_can_be_dropped(tmp_path):
    from safetensors import safe_open
    from safetensors.torch import save_file

    save_file({"a": torch.ones(500, 1000), "b": torch.ones(500, 1000)}, tmp_path / "x.safetensors")
    with safe_open(tmp_path / "x.safetensors", framework="pt") as handle:
        a, b = handle.get_tensor("a"), handle.get_tensor("b")
    assert are_of_a_file(a) and are_of_a_file(b) and not are_of_a_file(torch.ones(500, 1000))
    a[3, 3] = 2
    assert not are_of_a_file(a) and are_of_a_file(b[10:])
