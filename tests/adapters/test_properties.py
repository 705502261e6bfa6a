"""Reading and converting random adapters: sizes, missing experts, dtypes and patterns; and files that are no adapters
at all."""

from __future__ import annotations

import json
import struct
import tempfile
from pathlib import Path

import pytest
import torch
from helpers.adapters import delta_of, write_config
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from llamafactory_kt import KTError
from llamafactory_kt.adapters import ExpertsShape, open_adapter
from llamafactory_kt.tools.convert import convert_peft_to_kt_format

NAME = "base_model.model.model.layers.{}.mlp.experts.{}.{}_proj.lora_{}.weight"
SETTINGS = settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])
sizes = st.integers(1, 9)


@st.composite
def adapters(draw):
    """(shape, layers, tensors, config): some experts and projections without LoRA, ranks by pattern."""
    shape = ExpertsShape(draw(st.integers(1, 5)), draw(sizes), draw(sizes))
    layers = sorted(draw(st.sets(st.integers(0, 6), min_size=1, max_size=3)))
    dtype = draw(st.sampled_from([torch.bfloat16, torch.float16, torch.float32]))
    ranks = {"gate": draw(st.integers(1, 4)), "up": draw(st.integers(1, 4)), "down": draw(st.integers(1, 4))}
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    tensors = {}
    for layer in layers:
        for expert in range(shape.num_experts):
            last = expert == shape.num_experts - 1  # always there, so that the number of experts is known
            for projection, rank in ranks.items():
                if not last and not draw(st.booleans()):
                    continue
                out, size = shape.projection(projection)
                for side, of in (("A", (rank, size)), ("B", (out, rank))):
                    tensors[NAME.format(layer, expert, projection, side)] = torch.randn(of, generator=generator).to(
                        dtype
                    )
    config = {
        "r": 2, "lora_alpha": draw(st.integers(1, 9)), "use_rslora": draw(st.booleans()),
        "rank_pattern": {f"{p}_proj": r for p, r in ranks.items()},
        "alpha_pattern": draw(st.sampled_from([{}, {"down_proj": 5}])),
    }  # fmt: skip
    return shape, layers, tensors, config


def reference(shape, layer, expert, projection, tensors, config):
    """scaling * B @ A in float64, straight from the tensors."""
    names = [NAME.format(layer, expert, projection, side) for side in "AB"]
    if names[0] not in tensors:
        return torch.zeros(shape.projection(projection), dtype=torch.float64)
    a, b = (tensors[name].double() for name in names)
    alpha = config["alpha_pattern"].get(f"{projection}_proj", config["lora_alpha"])
    return alpha / (a.shape[0] ** 0.5 if config["use_rslora"] else a.shape[0]) * (b @ a)


@SETTINGS
@given(adapters(), st.sampled_from(["moe_lora.pt", "peft", "sglang"]))
def test_reading_and_converting_keep_every_delta(made, target):
    shape, layers, tensors, config = made
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "source"
        source.mkdir()
        save_file(tensors, source / "adapter_model.safetensors")
        write_config(source, "base", **config)
        output = Path(folder) / target
        convert_peft_to_kt_format(source, output, format=None if output.suffix else target)
        opened = [open_adapter(source), open_adapter(None, output) if output.suffix else open_adapter(output)]
        # A scaling folded into B is rounded once, to the file's dtype where that is exact and to float32 elsewhere.
        for adapter, bound in zip(opened, (1e-12, 1e-6), strict=True):
            assert adapter.layers == layers
            for layer in layers:
                lora = adapter.read_layer(layer, shape)
                for expert in range(shape.num_experts):
                    for p in ("gate", "up", "down"):
                        found = delta_of(lora, p, expert)
                        wanted = reference(shape, layer, expert, p, tensors, config)
                        assert torch.allclose(found, wanted, rtol=bound, atol=bound * 10)


def always_one_clear_error(directory: Path) -> None:
    for action in (open_adapter, lambda path: convert_peft_to_kt_format(path, path.parent / "out.pt")):
        with pytest.raises(KTError) as error:
            action(directory)
        assert str(directory) in str(error.value), "the file is named"
    assert not (directory.parent / "out.pt").exists()


@SETTINGS
@given(
    st.binary(max_size=200),
    st.sampled_from(["adapter_model.safetensors", "adapter_model.bin", "moe_lora.pt", "fused_expert_lora.safetensors"]),
)
def test_random_bytes(content, name):
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder) / "adapter"
        directory.mkdir()
        write_config(directory, "base", r=2, lora_alpha=2)
        if name == "moe_lora.pt":
            (directory / "adapter_config.json").unlink()
        (directory / name).write_bytes(content)
        always_one_clear_error(directory)


@SETTINGS
@given(
    st.dictionaries(
        st.sampled_from([NAME.format(0, e, "gate", side) for e in (0, 1) for side in "AB"] + ["__metadata__"]),
        st.fixed_dictionaries(
            {"dtype": st.sampled_from(["BF16", "F32", "NONSENSE"]), "shape": st.lists(st.integers(0, 2**62), max_size=3),
             "data_offsets": st.tuples(st.integers(0, 2**63 - 1), st.integers(0, 2**63 - 1))}
        ),
        min_size=1,
    ),
    st.integers(-8, 2**40),
)  # fmt: skip
def test_absurd_headers(header, extra):
    encoded = json.dumps(header).encode()
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder) / "adapter"
        directory.mkdir()
        write_config(directory, "base", r=2, lora_alpha=2)
        length = struct.pack("<Q", max(0, len(encoded) + extra))
        (directory / "adapter_model.safetensors").write_bytes(length + encoded + b"\0" * 64)
        always_one_clear_error(directory)
