"""Estimates against what is there after a load: the same bytes, by the counting of ``llamafactory-kt bench``."""

from __future__ import annotations

import json
import re
import shutil
import threading
from dataclasses import replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from helpers.adapters import make_adapter
from helpers.architectures import TINY, tiny_config
from helpers.children import KT, child
from helpers.fp8 import make_fp8
from helpers.loading import load
from helpers.marks import needs_native
from helpers.models import make_model
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.cache_utils import DynamicCache
from typer.testing import CliRunner

from llamafactory_kt import apply_adapter, optimize_for_inference
from llamafactory_kt.checkpoint.opening import MoEModel, auto_class
from llamafactory_kt.cli import app
from llamafactory_kt.ground.errors import KTAdapterError, KTModelError, KTPathError
from llamafactory_kt.tools.bench.memory import ModelBytes, cache_bytes
from llamafactory_kt.tools.bench.parts import operations_of
from llamafactory_kt.tools.bench.speed import Speed
from llamafactory_kt.tools.estimate import estimate, run
from llamafactory_kt.tools.estimate.forward import prompt, silence_experts
from llamafactory_kt.tools.estimate.results import CONTEXTS
from llamafactory_kt.tools.estimate.speed import MachineSpeed

SPEED = MachineSpeed("a CPU", 4, 1e9, 1e11, {16: Speed(1e9, 1e11), 8: Speed(5e8, 5e10), 4: Speed(2.5e8, 2.5e10)})


@pytest.fixture
def speed(monkeypatch):
    monkeypatch.setattr(run, "machine_speed", lambda measure_again: SPEED)


def row_of(found, backend: str, dense: str = "same", cache: str = "same", *, on_gpu: bool = False):
    return next(
        row
        for row in found.rows
        if (row.on_gpu, row.kt_backend, row.kt_dense, row.kt_cache) == (on_gpu, backend, dense, cache)
    )


def measured(model_path, adapter, keys: dict[str, str], tokens: int) -> tuple[ModelBytes, int]:
    """What bench counts of a loaded model, and of its cache after some tokens."""
    model = load(model_path, **keys)
    if adapter is not None:
        model, _ = apply_adapter(model, adapter)
    optimize_for_inference(model)
    ids = torch.arange(2, 2 + tokens)[None] % 500
    with torch.no_grad():
        cache = model(input_ids=ids, past_key_values=DynamicCache(config=model.config)).past_key_values
    return ModelBytes.of(model), cache_bytes(cache)


@needs_native
@pytest.mark.parametrize(
    "keys", [{"backend": "native"}, {"backend": "INT4", "dense": "int4"}, {"backend": "INT8", "dense": "int8"}], ids=str
)
def test_the_demo_takes_what_bench_counts(demo, speed, keys):
    """Latent attention, a dense layer, shared experts, an adapter on everything."""
    found = estimate(str(demo / "model"), str(demo / "adapter"))
    row, (counted, cache) = (
        row_of(found, keys["backend"], keys.get("dense", "same")),
        measured(demo / "model", demo / "adapter", keys, 128),
    )
    assert row.experts + row.dense + row.lora == counted.weights
    read = row.bytes_per_token[128]
    assert read == counted.experts_per_token + counted.others_per_token + counted.lora_per_token + cache
    assert row.cache == cache * CONTEXTS[-1] // 128
    assert found.model.disk == sum(file.stat().st_size for file in (demo / "model").glob("*.safetensors"))
    assert found.model.disk_is_measured and found.model.experts_per_token == 2


@needs_native
@pytest.mark.parametrize("cache", ["same", "int8"])
@pytest.mark.parametrize("tied", [False, True])
def test_keys_and_values_and_tied_embeddings(tmp_path, speed, cache, tied):
    model = make_model(tmp_path / "m", "qwen3_moe", tie_word_embeddings=tied, hidden_size=256)
    row = row_of(estimate(str(model)), "native", "int8", cache)
    counted, kept = measured(model, None, {"backend": "native", "dense": "int8", "cache": cache}, 128)
    assert row.experts + row.dense == counted.weights
    assert row.bytes_per_token[128] == counted.experts_per_token + counted.others_per_token + kept


@needs_native
def test_a_configuration_alone_says_the_same(tmp_path, speed, demo):
    shutil.copy(demo / "model" / "config.json", tmp_path / "other.json")
    alone, whole = (estimate(str(place)) for place in (tmp_path / "other.json", demo / "model"))
    assert alone.rows == [*map(partial(_with_free, whole), alone.rows)] and not alone.model.disk_is_measured
    assert alone.model.disk == pytest.approx(whole.model.disk, rel=0.01), "files have headers"


def _with_free(found, row):
    """The row of another estimate, whose memory was another."""
    return replace(row_of(found, row.kt_backend, row.kt_dense, row.kt_cache, on_gpu=row.on_gpu), fits=row.fits)


@needs_native
def test_quantized_checkpoints(tmp_path, speed):
    """FP8 stays FP8 with native, by the files' headers or by what the configuration says of blocks."""
    source = make_model(tmp_path / "m", "qwen3_moe", hidden_size=128, moe_intermediate_size=128)
    make_fp8(tmp_path, source, [64, 64])
    made = tmp_path / "fp8"
    shutil.copy(made / "config.json", tmp_path / "config.json")
    alone, whole = estimate(str(tmp_path / "config.json")), estimate(str(made))
    weights = 3 * 6 * 3 * 128 * 128
    for found in (alone, whole):
        assert row_of(found, "native").experts == weights + weights // 64**2 * 4
    assert whole.model.stored == "F8_E4M3" and alone.model.stored == "FP8"
    assert alone.model.disk == pytest.approx(whole.model.disk, rel=0.2)


def test_times_are_bytes_over_bandwidth(demo, speed):
    """Weights of each kind at the kernels' speed for it, all else at the memory's."""
    found = estimate(str(demo / "model"))
    row = row_of(found, "INT8")
    experts = row.experts * 2 // 8
    dense = row.bytes_per_token[128] - experts - row.cache // 64
    assert 1 / row.tokens_per_second[128] == pytest.approx(experts / 5e8 + dense / 1e9 + row.cache // 64 / 1e9)
    with_gpu = row_of(found, "INT8", on_gpu=True)
    assert 1 / with_gpu.tokens_per_second[8192] == pytest.approx(experts / 5e8)
    assert with_gpu.gpu == row.dense + with_gpu.cache and with_gpu.cpu == row.cpu - row.dense - row.cache
    config = json.loads((demo / "model" / "config.json").read_text())
    heads = config["num_attention_heads"] * (
        config["qk_nope_head_dim"] + config["qk_rope_head_dim"] + config["v_head_dim"]
    )
    assert with_gpu.cache == config["num_hidden_layers"] * heads * 2 * CONTEXTS[-1] > row.cache, (
        "keys and values, no latents"
    )
    assert found.best(False).kt_backend in ("INT4", "INT8", "native")


def test_the_speed_of_a_busy_machine_is_measured_again(tmp_path, monkeypatch):
    """When it is idle; and marked until then."""
    from llamafactory_kt.tools.estimate import speed

    monkeypatch.setenv("LLAMAFACTORY_KT_CACHE", str(tmp_path))
    measured = []
    monkeypatch.setattr(speed, "_measure", lambda: measured.append(1) or SPEED)
    for now, busy, times in ((3.0, True, 1), (2.0, True, 1), (0.1, False, 2), (3.0, False, 2)):
        monkeypatch.setattr(speed, "load_of_cores", lambda now=now: now)
        assert speed.machine_speed().was_busy == busy and len(measured) == times


def test_what_does_not_fit(demo, speed, monkeypatch):
    need = min(row.cpu + row.loading for row in estimate(str(demo / "model")).rows if not row.on_gpu)
    for free, fits in ((need, True), (need - 1, False)):
        monkeypatch.setattr(run, "available_memory", lambda free=free: free)
        found = estimate(str(demo / "model"))
        assert (found.best(False) is not None) == fits


@pytest.mark.parametrize("architecture", [name for name in TINY if name in CONFIG_MAPPING])
def test_every_architecture_runs_empty(architecture):
    """Sliding windows, states of linear attention, indexers, experts that are called in other ways."""
    config = tiny_config(architecture)
    with torch.device("meta"):
        model = auto_class(config).from_config(config)
    try:
        opened = MoEModel(model)
    except KTModelError:
        pytest.skip("another version's class")
    silence_experts(model, opened.experts)
    layers, operations = prompt(model, 40)
    assert layers and operations["experts"] > 0 and operations["linear"] > 0


def test_operations_are_those_of_a_model_with_values(tmp_path):
    path = make_model(tmp_path / "m", "qwen2_moe")
    model = AutoModelForCausalLM.from_pretrained(path)
    with torch.no_grad(), operations_of(model) as counted:
        model(input_ids=torch.arange(2, 42)[None], logits_to_keep=1)
    empty = MoEModel(AutoModelForCausalLM.from_pretrained(path).to("meta"))
    silence_experts(empty.model, empty.experts)
    assert prompt(empty.model, 40)[1] == counted


def test_models_that_are_not_there(tmp_path, demo, speed, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://no-such-host.invalid")
    monkeypatch.setattr("llamafactory_kt.tools.estimate.source.getproxies", dict)
    for name, message in (
        ("someone/some-model", r"could not be fetched from the hub: no-such-host\.invalid"),
        (str(tmp_path), "holds no config.json"),
        (str(tmp_path / "none"), "neither a folder nor a file"),
    ):
        with pytest.raises(KTPathError, match=message):
            estimate(name)
    other = make_model(tmp_path / "m", "mixtral")
    with pytest.raises(KTAdapterError):
        estimate(str(demo / "model"), str(make_adapter(tmp_path / "a", other)))


def test_a_name_on_the_hub(tmp_path, demo, monkeypatch, speed):
    """From a hub on this machine: the one file is fetched, and nothing else."""
    asked = []

    class Hub(SimpleHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self._answer(b"")

        def do_GET(self) -> None:
            self._answer((demo / "model" / "config.json").read_bytes())

        def _answer(self, body: bytes) -> None:
            asked.append(self.path)
            found = self.path.endswith("/config.json")
            self.send_response(200 if found else 404)
            size = len((demo / "model" / "config.json").read_bytes())
            for name, value in (("ETag", '"1"'), ("X-Repo-Commit", "0" * 40), ("Content-Length", str(size))):
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None: ...

    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", address)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
        template = f"{address}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
        found = estimate("someone/some-model")
        server.shutdown()
    assert {path.partition("?")[0] for path in asked if "/resolve/" in path} == {
        "/someone/some-model/resolve/main/config.json"
    }
    assert found.model.architecture == "DeepseekV2ForCausalLM" and not found.model.disk_is_measured


@needs_native
def test_the_command(demo, tmp_path, monkeypatch):
    """Measures this machine for real, once."""
    monkeypatch.setenv("LLAMAFACTORY_KT_CACHE", str(tmp_path))
    done = child(KT, "estimate", demo / "model", "--adapter", demo / "adapter")
    assert done.returncode == 0, done.stderr
    text = done.stdout
    assert " \n" not in text and "1.6 million parameters" in text
    assert "\x1b" not in text and "…" not in text and "%|" not in done.stderr
    assert len(re.findall(r"^ +(native|INT8|INT4) ", text, re.M)) == 21
    assert re.search(r"kt_backend .* LoRA .* at 8192 +prompt", text), "with all columns"
    done = CliRunner().invoke(app, ["estimate", str(demo / "model"), "--json"])
    found = json.loads(done.stdout)
    assert found["machine"]["kernels"]["4"]["products"] > 1e8 and len(found["rows"]) == 3 * 3 * 2 + 3
    reads = re.search(r"it reads (\d+) GB/s", text)
    assert reads and float(reads[1]) == round(found["machine"]["reads"] / 1e9), "recalled, not measured again"
