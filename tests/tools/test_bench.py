"""bench of configurations: its arithmetic on made-up figures, stock's merge, synthetic models, and one real run. Speeds are
never asserted."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import replace

import accelerate
import pytest
import torch
import yaml
from rich.console import Console
from tiny import ARCHITECTURES, make_adapter, make_model, merged_float32
from transformers import AutoModelForCausalLM

from llamafactory_kt import KTConfigError, KTMemoryError, KTModelError
from llamafactory_kt.adapters import open_adapters
from llamafactory_kt.checkpoint.discovery import find_experts
from llamafactory_kt.checkpoint.meta_model import empty_model
from llamafactory_kt.peft_side.split import check_peft_part
from llamafactory_kt.tools.bench import room, rounds, stock, synthetic
from llamafactory_kt.tools.bench.figures import Loaded, Machine, Measured, Report, Spread, ratio
from llamafactory_kt.tools.bench.rounds import bench
from llamafactory_kt.tools.bench.rows import Row, rows
from llamafactory_kt.tools.bench.shapes import Shape, parse_shape
from llamafactory_kt.tools.bench.sizes import Sizes
from llamafactory_kt.tools.bench.stock import BestExperts, merge_into
from llamafactory_kt.tools.bench.synthetic import Synthetic
from llamafactory_kt.tools.bench.tables import show

CONFIG = {"model_name_or_path": "m", "adapter_name_or_path": "a", "use_kt": True, "kt_backend": "torch"}
GIB = 2**30


def test_rows():
    found = {row.name: row for row in rows(CONFIG, ["stock", "kt_num_threads=4", "kt_debug=true", "base"])}
    assert list(found) == ["as configured", "base", "stock", "kt_num_threads=4", "kt_debug=true"]
    assert found["as configured"].loaded_config == CONFIG and "adapter_name_or_path" not in found["base"].loaded_config
    assert found["stock"].loaded_config == {"model_name_or_path": "m"} and found["stock"].config == CONFIG
    assert found["kt_num_threads=4"].config["kt_num_threads"] == 4 and found["kt_debug=true"].config["kt_debug"] is True
    assert [row.name for row in rows(CONFIG, base=False)] == ["as configured"]
    assert [row.name for row in rows({"model_name_or_path": "m"})] == ["as configured"], "no adapter to leave out"
    with pytest.raises(KTConfigError, match="unknown word 'fast', expected base, stock or key=value"):
        rows(CONFIG, ["fast"])


# Arithmetic

LOADED = Loaded("torch; torch 2", 2.0, 1 * GIB, 4 * GIB, 5 * GIB, 2 * GIB, 500_000_000, 250_000_000, push=0.25)
SLOW, FAST = [0.2, 0.4, 0.2], [0.1, 0.2, 0.05]


def made_up() -> Report:
    """In the second round the machine was twice as slow, and its memory too."""
    stock = replace(LOADED, engine="transformers", load=1.0, resident=3 * GIB, push=None)
    return Report(
        Machine("a CPU", 4, [50e9, 25e9, 50e9], checkpoint=8_000_000_000),
        [
            Measured("as configured", LOADED, [2.0, 6.0], {128: SLOW}, {128: SLOW}, [0.0, 0.9, 0.01], 6 * GIB, 7 * GIB),
            Measured("stock", stock, [1.0, 2.0], {128: FAST}, {128: FAST}, [0.4, 0.3], 6 * GIB),
        ],
    )


def test_each_round_begins_with_another_configuration(monkeypatch):
    """What comes first after a pause, or after the memory was read, is not always the same."""
    asked: list[str] = []

    class Answers:
        hello = LOADED

        def __init__(self, name: str):
            self.name = name

        @classmethod
        @contextmanager
        def running(cls, name, *_):
            yield cls(name)

        def ask(self, *words):
            if self.name == "memory bandwidth":
                return 50e9
            if words == ("end",):
                return 6 * GIB, 0
            asked.append(f"{self.name[:2]} {words[0]}")
            return len(asked), len(asked), None

    monkeypatch.setattr(rounds, "_Process", Answers)
    report = rounds.bench(rows(CONFIG, ["stock"]), [128, 9], rounds=4)
    one, two, three = (["as", "ba", "st"][n:] + ["as", "ba", "st"][:n] for n in range(3))
    assert asked == [f"{name} {length}" for names in (one, two, three, one) for length in (128, 9) for name in names]
    assert [m.decode[128] for m in report.rows] == [[1, 9, 14, 19], [2, 7, 15, 20], [3, 8, 13, 21]]


def test_ratios_are_of_the_same_round():
    """The middle of SLOW over the middle of FAST would be 2 as well; the spread tells the pairs."""
    assert ratio(SLOW, FAST) == Spread(2.0, 2.0, 4.0) and ratio(FAST, SLOW) == Spread(0.5, 0.25, 0.5)
    with pytest.raises(ValueError, match="shorter"):
        ratio(SLOW, FAST[:2])
    report = made_up()
    configured, stock = report.references
    assert report.ratios(stock, configured) == {
        "decode speed after 128": Spread(2.0, 2.0, 4.0),
        "prefill speed, 128 tokens": Spread(2.0, 2.0, 4.0),
        "load time": Spread((1 / 2 + 1 / 3) / 2, 1 / 3, 1 / 2),
        "memory": Spread(2 / 3, 2 / 3, 2 / 3),
    }


def test_figures_of_one_row():
    report = made_up()
    configured, stock = report.rows
    assert configured.added == 3 * GIB and configured.over_weights == 1.5
    assert report.floor(configured) == Spread(0.01, 0.01, 0.02), "0.5 GB at 50, 25 and 50 GB/s"
    for others, wanted in ((False, 0.05), (True, 0.075)):
        share = report.bandwidth_share(configured, 128, others=others)
        assert (share.median, share.low, share.high) == pytest.approx((wanted, wanted, wanted))
    assert report.load_rate(configured) == 8e9 / 4.0 / 4
    assert not configured.restless and stock.restless


def test_what_is_shown():
    out = io.StringIO()
    show(made_up(), Console(file=out, width=160))
    text = " ".join(out.getvalue().split())
    assert text.index("Ratios of the same round") < text.index("Figures")
    for part in (
        "against as configured │ │ │ │ decode speed after 128 │ 1 │ 2.00 (2.00-4.00)", "against stock", "0.50 (0.25-0.50) │ 1",
        "load time │ 1 │ 0.42 (0.33-0.50)", "200 (200-400) ms │ 100 (50-200) ms", "5.0 (2.5-5.0) │ 10.0 (5.0-20.0)",
        "added over weights │ 1.50 │ 1.00", "250.0 ms │ -", "0.50 GB/s │ 1.33 GB/s", "reads 50.0 GB/s (25.0-50.0)",
        "peak on GPU │ 7.0 GiB", "stock kept 0.35 cores busy while others were measured",
    ):  # fmt: skip
        assert part in text, (part, text)
    assert "as configured kept" not in text
    assert json.loads(json.dumps(made_up().to_dict()))["ratios"]["stock"]["as configured"]["memory"]["median"] == 1.5


def test_stock_that_is_on_a_gpu_whole():
    """Its weights take none of the CPU's memory, so nothing is over them."""
    report = made_up()
    stock = report.rows[1]
    stock.loaded = replace(stock.loaded, weights=0, experts_per_token=0, others_per_token=0, resident=GIB)
    stock.gpu_memory = 14 * GIB
    out = io.StringIO()
    show(report, Console(file=out, width=160))
    text = " ".join(out.getvalue().split())
    for part in ("memory │ 1 │ - │", "GPU memory │ 1 │ 2.00 │", "GPU memory │ 0.50 │ 1 │", "over weights │ 1.50 │ - │"):
        assert part in text, (part, text)
    assert json.loads(json.dumps(report.to_dict()))["rows"][1]["memory_over_weights"] is None


# Memory


def test_room_is_checked_for_all_together(tmp_path, monkeypatch):
    config = {**CONFIG, "model_name_or_path": str(make_model(tmp_path, "mixtral", max_shard_size="200KB"))}
    experts, others, layer = room.stored_weights(config["model_name_or_path"])
    assert (
        layer == 6 * 3 * 96 * 64 * 2
        and experts == 3 * layer
        and others
        == sum(p.nbytes for n, p in empty_model(tmp_path).bfloat16().named_parameters() if ".experts." not in n)
    )
    chosen = rows(config, ["stock", "kt_backend=AMXINT4"])
    monkeypatch.setattr(room, "available_memory", lambda: 36 * GIB)
    weights = room.Weights(8 * GIB, GIB, 2 * GIB)
    needs = room.check_room(chosen, weights, gpu_memory=0)
    assert list(needs.values()) == [9 * GIB, 9 * GIB, 9 * GIB, 3 * GIB]
    assert list(room.check_room(chosen, weights, gpu_memory=80 * GIB).values()) == [8 * GIB, 8 * GIB, 0, 2 * GIB]
    assert room.check_room(chosen, weights, gpu_memory=4 * GIB)["stock"] == 5 * GIB
    with pytest.raises(
        KTMemoryError, match=r"take 36.5 GiB \(.*, stock 9.0 GiB.*, 6.5 GiB for.*; 36.0 GiB are free.*--no-base"
    ):
        room.check_room(chosen, weights._replace(layer=3 * GIB), gpu_memory=0)
    assert room.stored_weights("some/name-on-the-hub") is None


# Stock


@torch.no_grad()
def test_stock_with_the_adapter_merged(tmp_path):
    """The experts are the float32 sum rounded once, bit by bit; the rest is PEFT's merge in bfloat16."""
    model = make_model(tmp_path / "model", "deepseek_v2")
    adapters = [make_adapter(tmp_path / f"a{r}", model, rank=r, alpha=7, skip_layers=(r - 3,), seed=r) for r in (4, 5)]
    wanted = merged_float32(model, adapters, dtype=torch.bfloat16)
    stock = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
    before = {name: weight.clone() for name, weight in stock.state_dict().items()}
    merged = merge_into(stock, open_adapters(adapters))
    assert type(merged) is type(stock)
    found, changed = merged.state_dict(), 0
    for name, weight in wanted.state_dict().items():
        if ".experts." in name:
            assert torch.equal(found[name], weight), name
        else:
            torch.testing.assert_close(found[name], weight, rtol=0.02, atol=0.02)
        changed += not torch.equal(found[name], before[name])
    assert changed == len(
        [n for n in found if "norm" not in n and "embed" not in n and "lm_head" not in n and "gate.weight" not in n]
    )

    best = BestExperts(merged, [5, 9])
    assert set(best.best) == {1, 5, 9} and set(best.best.values()) <= {"eager", "grouped_mm", "batched_mm"}
    assert best._time("made for others", 5) is None, "an implementation that cannot run here is left out"
    best.best[5] = "batched_mm"
    best(5)
    assert merged.config._experts_implementation == "batched_mm"


@torch.no_grad()
def test_stock_that_a_gpu_does_not_hold(tmp_path, monkeypatch):
    """accelerate's own hooks copy each layer's weights, to the CPU itself; only its choice of another device is not made here.

    Not with DeepSeek-V2, whose routers transformers computes past these hooks, so that stock answers nonsense.
    """
    path = make_model(tmp_path / "model", "qwen3_moe")
    adapter = make_adapter(tmp_path / "adapter", path)
    whole = merge_into(AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16), open_adapters([adapter]))
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
    ids = torch.arange(2, 20)[None]
    unlike = model(input_ids=ids).logits
    sizes = Sizes.of(model)

    def dispatch(model, places, **_):
        assert places == {"lm_head": 0, "model": "cpu"}
        accelerate.cpu_offload(model.model, execution_device=torch.device("cpu"))

    monkeypatch.setattr(accelerate, "dispatch_model", dispatch)
    model.hf_device_map = {"lm_head": 0, "model": "cpu"}
    dispatch(model, model.hf_device_map)
    merged = merge_into(model, open_adapters([adapter]))
    assert {weight.is_meta for weight in merged.model.layers[1].mlp.experts.parameters()} == {True}
    logits = merged(input_ids=ids).logits
    assert torch.equal(logits, whole(input_ids=ids).logits) and not torch.equal(logits, unlike)
    copied = Sizes.of(merged)
    assert copied.weights == sizes.weights and copied.others_per_token == sizes.others_per_token
    assert copied.experts_per_token == sizes.experts_per_token * 6 // 3, "all experts are copied, not only those chosen"

    model.hf_device_map["model"] = "disk"
    with pytest.raises(KTModelError, match=r"leaves a part of it on disk.*without --against stock"):
        merge_into(model, open_adapters([adapter]))


def test_a_slow_implementation_is_timed_once(monkeypatch, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(make_model(tmp_path / "model", "deepseek_v2"))
    calls: list[int] = []
    model.register_forward_pre_hook(lambda _, __, given: calls.append(given["input_ids"].shape[1]), with_kwargs=True)
    assert BestExperts(model, [5])._time("eager", 5) > 0
    assert calls[-3:] == [5, 5, 5]
    calls.clear()
    monkeypatch.setattr(stock, "ENOUGH", 1e-9)
    best = BestExperts(model, [5])
    assert set(best.best) == {1, 5}
    assert calls == [5, 5, 5, 1, 1, 1], "once for each implementation, the slow ones too"


# Synthetic models


@pytest.mark.parametrize(
    ("name", "parameters"),  # as published
    [
        ("deepseek-v2-lite", 15_706_484_224),
        ("qwen3-30b-a3b", 30_532_122_624),
        ("mixtral-8x7b", 46_702_792_704),
        ("deepseek-v3", 671_026_419_200),
    ],
)
def test_synthetic_sizes_are_the_published_ones(name, parameters):
    assert Synthetic.of(parse_shape(name)).weights.total == 2 * parameters


def test_synthetic_names():
    assert parse_shape("DeepSeek-V2-Lite:4").name == "deepseek-v2-lite-4"
    with pytest.raises(KTConfigError, match="unknown model 'deepseek-v2', expected deepseek-v2-lite, deepseek-v3"):
        parse_shape("deepseek-v2:4")
    for wrong in ("3", "62", "x", ""):
        with pytest.raises(
            KTConfigError, match=rf"4 to 61 layers \(its first 3 have no routed experts\), found '{wrong}'"
        ):
            parse_shape(f"deepseek-v3:{wrong}")


def tiny(architecture: str) -> Synthetic:
    values = {key: value for key, value in ARCHITECTURES[architecture].items() if not key.endswith("token_id")}
    return Synthetic.of(Shape("tiny-3", architecture, values))


@pytest.mark.parametrize("architecture", ["deepseek_v2", "deepseek_v3", "mixtral", "qwen3_moe"])
def test_synthetic_models_are_complete(tmp_path, monkeypatch, architecture):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(synthetic, "_POOL", 2**12)  # smaller than a tensor, as with real sizes
    made = tiny(architecture)
    assert not made.directory.exists(), "sizes alone write nothing"
    chat = made.build()
    assert chat == tmp_path / "llamafactory-kt" / "synthetic" / "tiny-3" / "chat.yaml"
    assert sorted(path.name for path in made.directory.iterdir()) == ["adapter", "chat.yaml", "model"]
    loaded, info = AutoModelForCausalLM.from_pretrained(made.model, dtype=torch.bfloat16, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert made.weights.total == sum(2 * t.numel() for t in loaded.state_dict().values())
    assert loaded.get_input_embeddings().weight.detach().float().std().item() == pytest.approx(1, rel=0.1), (
        "as large as what layers add"
    )
    ids = torch.arange(40)[None]
    with torch.no_grad():
        assert loaded(ids).logits.isfinite().all()
    adapters = open_adapters([made.adapter])
    modules = find_experts(loaded)
    adapters.check_fits({module.layer: module.shape for module in modules})
    assert adapters.layers == [module.layer for module in modules]
    assert check_peft_part(loaded, adapters.adapters[0]).tensors == adapters.adapters[0].other_names
    experts = [made.tensors[n] for n in made.tensors if ".experts." in n]
    assert len(adapters.adapters[0].expert_names) == 2 * len(experts) == 2 * 3 * 6 * len(modules)
    stamps = {path: path.stat().st_mtime_ns for path in made.directory.glob("*/*")}
    made.build()
    assert stamps == {path: path.stat().st_mtime_ns for path in made.directory.glob("*/*")}, "made once"


def test_synthetic_is_not_half_written(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    made = tiny("mixtral")
    monkeypatch.setattr(synthetic.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1000}))
    with pytest.raises(KTModelError, match=r"takes \d.* MiB, and 1.0 KiB are free.*XDG_CACHE_HOME"):
        made.build()
    monkeypatch.undo()
    monkeypatch.setattr(synthetic, "_byte_tokenizer", lambda: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        made.build()
    assert not list(made.directory.iterdir())


# Real runs


def run(*words: object, **env: str) -> subprocess.CompletedProcess:
    import os

    return subprocess.run(
        [sys.executable, "-m", "llamafactory_kt", "bench", *map(str, words)],
        capture_output=True, text=True, env={**os.environ, "COLUMNS": "160", **env},
    )  # fmt: skip


def test_a_real_run(tmp_path, demo):
    config = {
        "model_name_or_path": str(demo / "model"), "adapter_name_or_path": str(demo / "adapter"), "template": "deepseek",
        "use_kt": True, "kt_backend": "torch",
    }  # fmt: skip
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump(config))
    words = [
        "--against", "stock", "--against", "kt_merge_adapter=true",
        "--no-base", "--prompt-tokens", "16,40", "--new-tokens", "3", "--rounds", "2",
    ]  # fmt: skip
    result = run(path, "kt_router_stats=true", *words, "--json", "-")
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    configured, stock, merged = found["rows"]
    assert [row["name"] for row in found["rows"]] == ["as configured", "stock", "kt_merge_adapter=true"]
    assert configured["loaded"]["engine"].startswith("torch with ") and "for 40" in stock["loaded"]["engine"]
    assert configured["loaded"]["push"] > 0 and stock["loaded"]["push"] is merged["loaded"]["push"] is None
    files = sum(f.stat().st_size for f in (demo / "model").glob("*.safetensors"))
    for one in (configured, stock):
        assert set(one["prefill"]) == set(one["decode"]) == {"16", "40"}
        assert all(len(times) == 2 and min(times) > 0 for part in ("prefill", "decode") for times in one[part].values())
        loaded = one["loaded"]
        assert 2**27 < loaded["before"] <= loaded["resident"] <= loaded["peak_loading"] and one["peak"] > 2**27
        # Three layers, two of eight experts a token, in bfloat16.
        assert loaded["experts_per_token"] == 3 * 2 * 3 * 128 * 96 * 2
    assert stock["loaded"]["weights"] == pytest.approx(files, rel=0.01) and found["machine"]["checkpoint"] == files
    assert configured["loaded"]["weights"] >= stock["loaded"]["weights"] + 2 * (60_672 + 129_024), "and its LoRA"
    assert (
        len(found["machine"]["bandwidth"]) == 2 and "decode speed after 40" in found["ratios"]["stock"]["as configured"]
    )


def test_a_configuration_that_cannot_be_loaded(tmp_path):
    config = {**CONFIG, "model_name_or_path": str(tmp_path / "none"), "adapter_name_or_path": None}
    with pytest.raises(KTConfigError, match=r"x cannot be measured: .*model_name_or_path: .*/none does not exist"):
        bench([Row("x", config)])


def test_keys_of_later_rows_are_checked_before_anything_is_loaded(demo):
    config = {**CONFIG, "model_name_or_path": str(demo / "model"), "adapter_name_or_path": None}
    wrong = {**config, "kt_backend": "AMXINT8"}
    with pytest.raises(KTConfigError, match=r"kt_backend=AMXINT8 cannot be measured: .*needs kt_weight_path"):
        bench([Row("as configured", config), Row("kt_backend=AMXINT8", wrong)], tick=lambda: pytest.fail("loaded"))
