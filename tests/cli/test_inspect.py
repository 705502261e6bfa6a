"""``llamafactory-kt inspect``: what it counts, measures, draws and finds wrong."""

from __future__ import annotations

import json

import pytest
import torch
from helpers.adapters import delta_of, edit_adapter, make_adapter
from helpers.models import make_model, other_modules
from helpers.places import DATA
from safetensors.torch import load_file
from typer.testing import CliRunner

from llamafactory_kt import KTPathError
from llamafactory_kt.adapters import open_adapter
from llamafactory_kt.adapters.inspection import inspect_adapter
from llamafactory_kt.cli import app


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("m"), "deepseek_v2")


def run(*words) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["inspect", *map(str, words)])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.output


def test_groups_are_counted_by_headers(tmp_path, model):
    adapter = make_adapter(tmp_path / "a", model, rank=4, alpha=6)
    code, output = run(adapter, "--json")
    found = json.loads(output)
    tensors = load_file(adapter / "adapter_model.safetensors")
    assert code == 0 and found["tensors"] == len(tensors) and found["nbytes"] == sum(t.nbytes for t in tensors.values())
    modules = other_modules(model)
    wanted = {
        "attention": 2 * sum("self_attn" in name for name in modules),
        "shared experts": 2 * sum("shared_experts" in name for name in modules),
        "dense MLP": 2 * sum(".layers.0.mlp." in name for name in modules),
        "routed experts": 2 * 2 * 6 * 3,
    }
    assert {kind: group["tensors"] for kind, group in found["groups"].items()} == wanted
    assert found["groups"]["attention"]["settings"] == ["4 / 6 / 1.5"] == found["groups"]["routed experts"]["settings"]
    assert found["layers"] == {"1": 6, "2": 6} and found["norms"] is None
    assert found["groups"]["attention"]["not_finite"] is None, "values are not read unless asked for"


@pytest.mark.parametrize("source", ["qwen3_moe-tiny-kt-bundle", "qwen3_moe-tiny-target-parameters"])
def test_norms_against_the_products_themselves(source):
    adapter = open_adapter(DATA / source)
    shapes = adapter.own_shapes()
    found = inspect_adapter(adapter, values=True).norms
    for layer, row in found.items():
        lora = adapter.read_layer(layer, shapes[layer])
        for expert, norm in enumerate(row):
            deltas = [delta_of(lora, p, expert) for p in lora.a]
            assert norm == pytest.approx(float(torch.cat([d.flatten() for d in deltas]).norm()), rel=1e-9)


def test_values_that_are_not_finite(tmp_path, model):
    def spoil(tensors):
        bad = [
            *[n for n in tensors if ".experts.3." in n][:5],
            "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight",
        ]
        return {n: t * float("nan") if n in bad else t for n, t in tensors.items()}

    adapter = edit_adapter(make_adapter(tmp_path / "a", model), spoil)
    code, output = run(adapter, "--values", "--json")
    groups = json.loads(output)["groups"]
    assert "NaN" not in output, "JSON knows no NaN"
    assert (
        code == 1 and len(groups["routed experts"]["not_finite"]) == 5 and len(groups["attention"]["not_finite"]) == 1
    )
    assert "and 2 more" in run(adapter, "--values")[1]
    assert "and 2 more" not in run(adapter, "--values", "-v")[1]


def test_does_it_fit(tmp_path, model):
    adapter = make_adapter(tmp_path / "a", model)
    assert json.loads(run(adapter, "--model", model, "--json")[1])["fits"] is True
    other = make_model(tmp_path / "other", "deepseek_v2", n_routed_experts=5)
    code, output = run(adapter, "--model", other, "--json")
    assert code == 1 and "layer 1, expert 5, gate_proj: the model has 5 experts" in json.loads(output)["problem"]


def test_a_model_that_is_not_there(tmp_path, model):
    adapter = make_adapter(tmp_path / "a", model)
    result = CliRunner().invoke(app, ["inspect", str(adapter), "--model", str(tmp_path / "none")])
    assert isinstance(result.exception, KTPathError) and "is not a model that can be opened" in str(result.exception)


def test_heat_map(tmp_path, model):
    adapter = make_adapter(tmp_path / "a", model)
    assert run(adapter, "--heatmap", tmp_path / "map.png")[0] == 0
    assert (tmp_path / "map.png").read_bytes().startswith(b"\x89PNG")
    without = make_adapter(tmp_path / "b", model, skip_layers=(0, 1, 2))
    assert run(without, "--heatmap", tmp_path / "none.png")[0] != 0 and not (tmp_path / "none.png").exists()
    assert "no expert LoRA" in run(without)[1]


def test_what_was_changed_most_comes_first(tmp_path, model):
    """All experts and layers in two lines, before the table."""
    adapter = make_adapter(tmp_path / "a", model)
    code, output = run(adapter, "--values")
    norms = json.loads(run(adapter, "--values", "--json")[1])["norms"]
    every = {(float(norm), int(layer), expert) for layer, row in norms.items() for expert, norm in enumerate(row)}
    norm, layer, expert = max(every)
    assert code == 0 and f"most changed: expert {expert} of layer {layer} ({norm:.3g}), " in output
    assert output.index("most changed: ") < output.index("most changed experts")
    assert f"{len(every)} experts in {len(norms)} layers" in output and "1-2 (6 each)" in output
