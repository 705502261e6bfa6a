"""``llamafactory-kt verify``: passes where the engine is right, and names what is wrong in it. Nothing in the files is
changed; what the engine holds is."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
import yaml
from helpers.adapters import make_adapter
from helpers.marks import ENGINES
from helpers.models import make_model, moe_layers
from helpers.references import merged_float32, rel
from rich.console import Console
from torch.nn import functional as F
from typer.testing import CliRunner

from llamafactory_kt.adapters import open_adapters
from llamafactory_kt.cli import app, checks
from llamafactory_kt.engines.registry import get_engine
from llamafactory_kt.ground.errors import KTConfigError
from llamafactory_kt.integration.chat import LoadedChat
from llamafactory_kt.integration.prompts import make_prompts
from llamafactory_kt.model.state import kt_state
from llamafactory_kt.tools.verify import LayerResult, record_inputs, verify_layers
from llamafactory_kt.tools.verify.compare import Comparison, compare
from llamafactory_kt.tools.verify.reference import Reference


def write(path: Path, demo: Path, **keys) -> Path:
    values = {
        "model_name_or_path": str(demo / "model"), "adapter_name_or_path": str(demo / "adapter"),
        "template": "deepseek", "use_kt": True, **keys,
    }  # fmt: skip
    path.write_text(yaml.safe_dump({k: v for k, v in values.items() if v is not None}))
    return path


def command(*arguments) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["verify", *map(str, arguments)])
    assert not isinstance(result.exception, Exception) or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.stdout


@pytest.mark.parametrize("backend", ENGINES)
def test_the_demo_passes(tmp_path, demo, backend):
    status, output = command(write(tmp_path / "c.yaml", demo), f"kt_backend={backend}", "--json")
    content = json.loads(output)
    assert status == 0 and content["passed"] and [layer["layer"] for layer in content["layers"]] == [1, 2, 3]
    for layer in content["layers"]:
        assert layer["engine"] == backend and 0 < layer["prompt"]["base"] < 0.02
        assert layer["prompt"]["cosine"] > 0.999 and layer["prompt"]["strength"] == pytest.approx(1, abs=0.01)
        assert layer["prompt"]["effect"] > 0.1, "the demo's adapter changes a lot"


def test_layers_and_the_table(tmp_path, demo):
    config = write(tmp_path / "c.yaml", demo, adapter_name_or_path=None)
    status, output = command(config, "kt_backend=torch", "--layers", "1,3-3")
    assert status == 0 and " none " in output
    assert "All 2 layers are right (others were not asked for); engine torch; worst: layer " in output
    for layers, message in (("0-2", "no routed experts in 0; the model has them in 1-"), ("x", "numbers and ranges")):
        result = CliRunner().invoke(app, ["verify", str(config), "kt_backend=torch", "--layers", layers])
        assert result.exit_code == 2 and message in result.output
    result = CliRunner().invoke(app, ["verify", str(config), "use_kt=false"])
    assert isinstance(result.exception, KTConfigError) and "does not ask for use_kt" in str(result.exception)
    result = CliRunner().invoke(app, ["verify", str(config), "templat=deepseek"])
    assert isinstance(result.exception, KTConfigError) and "did you mean template?" in str(result.exception)


@pytest.mark.parametrize(("columns", "framed"), [(80, False), (85, True)])
def test_a_narrow_terminal(monkeypatch, capsys, columns, framed):
    """Has the whole words of all columns."""
    monkeypatch.setattr(checks, "console", lambda: Console(width=columns))
    found = Comparison(0.0017, 0.0017, 1.28, 1.0, 1.0, "")
    layer = LayerResult(47, "native", found, [found])
    checks._show([layer], [], layer, False)
    table = capsys.readouterr().out.rstrip().splitlines()
    assert max(map(len, table)) <= columns and ("│ 47 " in table[3]) is framed
    assert [title in table[1] for title in ("with LoRA", "strength", "cosine", "expert")] == [True] * 4


@pytest.fixture(scope="module", params=ENGINES)
def loaded(request, tmp_path_factory, demo):
    chat = LoadedChat.load_yaml(write(tmp_path_factory.mktemp("c") / "c.yaml", demo, kt_backend=request.param))
    ids = chat.encode(*make_prompts(["Hello, who are you? 你好，请介绍一下你自己。"])).ids
    inputs = record_inputs(chat.model, ids)
    return chat, inputs, Reference(chat.checkpoint, chat.adapters)


def scaled(lora, factor=2.0):
    return dataclasses.replace(lora, scaling={p: s * factor for p, s in lora.scaling.items()})


def shuffled(lora):
    turned = [{p: t.roll(1, 0) for p, t in part.items()} for part in (lora.a, lora.b)]
    return dataclasses.replace(lora, a=turned[0], b=turned[1])


def one_expert(lora):
    b = {p: t.clone() for p, t in lora.b.items()}
    for tensor in b.values():
        tensor[5] = 0
    return dataclasses.replace(lora, b=b)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (scaled, "the effect of LoRA has strength "),
        (lambda lora: scaled(lora, 1.1), "the effect of LoRA has strength 1."),
        (shuffled, "the effect of LoRA has strength 0.0"),
        (lambda lora: None, "the adapter's LoRA has no effect"),
        (one_expert, "expert 5: the adapter's LoRA has no effect"),
    ],
    ids=["scaled", "slightly scaled", "experts shuffled", "layer missing", "one expert missing"],
)
def test_an_adapter_that_is_wrong_in_the_engine(loaded, change, message):
    chat, inputs, reference = loaded
    wrapper = kt_state(chat.model).wrappers[1]
    undo = wrapper.engine.set_lora(change(reference.lora(2)))
    found = {result.layer: result.problem for result in verify_layers(chat.model, inputs, reference)}
    undo()
    assert message in found[2] and not found[1] and not found[3]
    assert not any(result.problem for result in verify_layers(chat.model, inputs, reference)), "left as it was"


def test_lora_that_the_adapter_does_not_have(loaded):
    chat, inputs, _ = loaded
    without = Reference(chat.checkpoint, open_adapters(None))
    assert all("the adapter does not have" in r.problem for r in verify_layers(chat.model, inputs, without))


def test_base_weights_that_are_wrong(loaded):
    chat, inputs, reference = loaded
    wrapper = kt_state(chat.model).wrappers[0]
    engine = wrapper.engine

    def spoilt(dtype):
        for number, expert in enumerate(engine.read_experts(dtype)):
            yield expert._replace(up=expert.up * 1.05) if number == 3 else expert

    wrapper.engine = type(engine)(engine.spec, spoilt, engine.options)
    wrapper.engine.load()
    wrapper.engine.set_lora(reference.lora(wrapper.layer_idx))
    first = next(verify_layers(chat.model, inputs, reference))
    wrapper.engine = engine
    assert first.problem.startswith("expert 3: without LoRA the output is off by 0.0") and first.worst_expert == 3


@pytest.mark.parametrize("backend", ENGINES)
def test_a_small_adapter_is_not_lost_in_rounding(tmp_path, backend):
    """Effects of a hundredth of the output: still seen, and their double is caught."""
    model = make_model(tmp_path / "m", "qwen3_moe")
    adapter = make_adapter(tmp_path / "a", model, scale=0.02)
    chat = LoadedChat.load_yaml(
        write(tmp_path / "c.yaml", tmp_path, model_name_or_path=str(model), adapter_name_or_path=str(adapter), kt_backend=backend)
    )  # fmt: skip
    inputs, reference = record_inputs(chat.model, list(range(2, 40))), Reference(chat.checkpoint, chat.adapters)
    results = list(verify_layers(chat.model, inputs, reference))
    assert not any([result.problem for result in results]), results
    assert max(r.prompt.effect for r in results) < 0.03
    wrapper = kt_state(chat.model).wrappers[0]
    wrapper.engine.set_lora(scaled(reference.lora(0)))
    first = next(verify_layers(chat.model, inputs, reference))
    assert first.problem and first.prompt.strength == pytest.approx(2, rel=0.05)


@pytest.mark.parametrize(
    ("architecture", "fused", "naming"), [("mixtral", False, "mixtral"), ("deepseek_v2", True, "B"), ("qwen2_moe", False, "B")]
)  # fmt: skip
def test_the_reference_is_stock_transformers_arithmetic(tmp_path, architecture, fused, naming):
    model = make_model(tmp_path / "m", architecture, save_original_format=not fused)
    adapter = make_adapter(tmp_path / "a", model, naming=naming)
    reference = Reference(model, open_adapters(adapter))
    torch.manual_seed(0)
    for merged, place in ((merged_float32(model, None), 0), (merged_float32(model, adapter), 1)):
        for layer, (name, experts, hidden, _) in moe_layers(model).items():
            x, weights = torch.randn(20, hidden), torch.rand(20, 3)
            index = torch.stack([torch.randperm(experts)[:3] for _ in range(20)])
            with torch.no_grad():
                wanted = merged.get_submodule(name)(x, index, weights)
            found = reference.compute(layer, x, index, weights)
            assert rel(found[place], wanted) < 1e-5 < rel(found[1 - place], wanted)


def in_four_bits(weight: torch.Tensor) -> torch.Tensor:
    scale = weight.abs().amax(1, keepdim=True) / 7
    return (weight / scale).round() * scale


def test_four_bits_pass_with_rows_as_long_as_real_ones():
    """What rounding each row to 15 steps makes of experts of DeepSeek-V2-Lite's size, in float32 and by no kernel."""
    torch.manual_seed(0)
    sizes, bounds = ((1408, 2048), (1408, 2048), (2048, 1408)), get_engine("AMXINT4").bounds

    def computed(weights, factor=1.0):
        both = weights, [weight + factor * delta for weight, delta in zip(weights, deltas, strict=True)]
        return tuple((F.silu(x @ gate.T) * (x @ up.T)) @ down.T for gate, up, down in both)

    for _ in range(8):
        x = torch.randn(32, 2048)
        weights = [0.02 * torch.randn(size) for size in sizes]
        deltas = [0.004 * torch.randn(rows, 8) @ torch.randn(8, columns) for rows, columns in sizes]
        wanted, rounded = computed(weights), [in_four_bits(weight) for weight in weights]
        every = [computed(rounded, factor) for factor in (1.0, 0.0, 0.5, 2.0)]
        for row in range(32):  # alone, as verify gives an expert one
            found, *wrong = (
                compare(*(tuple(part[row : row + 1] for part in pair) for pair in (outputs, wanted)), bounds)
                for outputs in every
            )
            assert not found.problem and found.base > 0.2 and found.effect > 0.5, found
            assert all(comparison.problem for comparison in wrong)
