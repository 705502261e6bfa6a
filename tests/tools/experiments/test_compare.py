"""``llamafactory-kt compare``: its measures against stock transformers, and its report."""

from __future__ import annotations

import json
import math

import pytest
import torch
import transformers
import yaml
from helpers.adapters import make_adapter
from helpers.models import make_model
from helpers.places import CHROMIUM
from helpers.references import merged_float32
from typer.testing import CliRunner

from llamafactory_kt import KTConfigError
from llamafactory_kt.cli import app
from llamafactory_kt.tools.experiments.comparing import warnings_about
from llamafactory_kt.tools.experiments.measuring import PromptResult, VariantResult
from llamafactory_kt.tools.experiments.plan import Variant, group_variants, plan_variants

ROWS = [
    {"instruction": "Hello, who are you?", "output": "</script><b>A cat & more</b>"},
    {"instruction": "什么是 LoRA？", "output": "低秩"}, {"instruction": "Tell me a joke."},
]  # fmt: skip
PARTS = ["config: off", "config: attention", "config: experts", "config: on"]


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """One ablation in float32: (model, adapter, output directory)."""
    root = tmp_path_factory.mktemp("compare")
    model = make_model(root / "model", "deepseek_v2", dtype=torch.float32)
    adapter = make_adapter(root / "adapter", model, dtype=torch.float32, scale=0.3)
    keys = {
        "model_name_or_path": str(model), "adapter_name_or_path": str(adapter), "template": "deepseek", "use_kt": True,
        "kt_backend": "torch", "infer_dtype": "float32", "do_sample": False, "max_new_tokens": 12,
    }  # fmt: skip
    (root / "config.yaml").write_text(yaml.safe_dump(keys))
    (root / "prompts.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    words = ["compare", "config.yaml", "--ablate", "--prompts", "prompts.jsonl", "--output", "out", "--kl-tokens", "9"]
    result = CliRunner().invoke(
        app, [str(root / w) if w in ("config.yaml", "prompts.jsonl", "out") else w for w in words]
    )
    assert result.exit_code == 0, result.output
    return model, adapter, root / "out"


def encode(model, row):
    """Token ids of (prompt, answer), from LLaMA-Factory's template."""
    from llamafactory.data import get_template_and_fix_tokenizer
    from llamafactory.hparams import DataArguments
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    template = get_template_and_fix_tokenizer(tokenizer, DataArguments(template="deepseek"))
    messages = [
        {"role": "user", "content": row["instruction"]},
        {"role": "assistant", "content": row.get("output", "")},
    ]
    return template.encode_oneturn(tokenizer, messages)


@torch.inference_mode()
def test_measures_against_stock_transformers(compared):
    model, adapter, output = compared
    data = json.loads((output / "comparison.json").read_text())
    assert data["first"] == PARTS[0] and [variant["name"] for variant in data["variants"]] == PARTS
    base = merged_float32(model, None)
    stock = {0: base, 1: merged_float32(model, adapter, experts=False), 3: merged_float32(model, adapter)}
    for place, other in stock.items():
        variant = data["variants"][place]
        total = tokens = 0
        for row, found in zip(ROWS, variant["rows"], strict=True):
            prompt, answer = encode(model, row)
            ids = torch.tensor([prompt])
            text = base.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)[
                :, : len(prompt) + 9
            ]
            count = text.shape[1] - len(prompt)
            p, q = (m(text).logits[0, -count - 1 : -1].log_softmax(-1) for m in (base, other))
            assert found["kl"] == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-3, abs=1e-6)
            assert found["top1"] == pytest.approx(float((p.argmax(-1) == q.argmax(-1)).float().mean()))
            if "output" in row:
                ids = torch.tensor([prompt + answer])
                loss = other(ids, labels=torch.tensor([[-100] * len(prompt) + answer])).loss
                assert found["perplexity"] == pytest.approx(math.exp(loss), rel=1e-3)
                total, tokens = total + float(loss) * len(answer), tokens + len(answer)
            else:
                assert found["perplexity"] is None and found["exact_match"] is None
        assert variant["mean"]["perplexity"] == pytest.approx(math.exp(total / tokens), rel=1e-3)
    kls = [variant["mean"]["kl"] for variant in data["variants"]]
    assert kls[0] == 0 and len({round(kl, 4) for kl in kls}) == 4, "each part has an effect of its own"
    assert all(v["tokens_per_second"] > 0 and v["memory"] > 2**20 for v in data["variants"])


def test_reports_say_what_was_compared(compared):
    """With what, where and when; as HTML and as Markdown."""
    model, adapter, output = compared
    about = json.loads((output / "comparison.json").read_text())["about"]
    assert about["models"] == [str(model)] and about["adapters"] == [str(adapter)]
    assert about["versions"]["transformers"] == transformers.__version__ and about["created"].startswith("20")
    texts = [(output / name).read_text() for name in ("report.html", "report.md")]
    for wanted in (
        str(model),
        str(adapter),
        f"transformers {transformers.__version__}",
        about["created"],
        about["machine"],
    ):
        assert all(wanted in text for text in texts)
    rows = [line for line in texts[1].splitlines() if line.startswith("| config: ")]
    assert [row.split(" | ")[0] for row in rows] == [f"| {part}" for part in PARTS]


def test_report_in_a_browser(compared):
    """It opens without errors and without the network, and shows the numbers of the JSON file."""
    playwright = pytest.importorskip("playwright.sync_api")
    if not CHROMIUM.is_file():
        pytest.skip(f"{CHROMIUM} is not installed")
    output = compared[2]
    data = json.loads((output / "comparison.json").read_text())
    problems: list[str] = []
    with playwright.sync_playwright() as tool:
        browser = tool.chromium.launch(executable_path=str(CHROMIUM), args=["--no-sandbox"])
        page = browser.new_page()
        page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("request", lambda request: problems.append(request.url) if request.url.startswith("http") else None)
        page.goto((output / "report.html").as_uri())
        cells = {
            key: page.locator(f"#summary td[data-key={key}]").all_inner_texts()
            for key in ("kl", "top1", "perplexity", "tokens_per_second")
        }
        answers = page.locator("#answers tbody tr").all_inner_texts()
        images = page.eval_on_selector_all("img", "all => all.map(image => image.naturalWidth)")
        embedded = page.evaluate("JSON.parse(document.getElementById('data').textContent)")
        page.set_viewport_size({"width": 800, "height": 600})
        page.emulate_media(color_scheme="dark")
        width = page.evaluate("document.documentElement.scrollWidth")
        lightness = page.evaluate("getComputedStyle(document.querySelector('.plots img')).filter")
        browser.close()
    assert problems == [] and embedded == data
    assert width <= 800 and "invert" in lightness
    means = [variant["mean"] for variant in data["variants"]]
    assert cells["kl"] == [f"{m['kl']:.4g}" for m in means] and cells["top1"] == [f"{m['top1']:.1%}" for m in means]
    assert cells["perplexity"] == [f"{m['perplexity']:.4g}" for m in means]
    assert cells["tokens_per_second"] == [f"{v['tokens_per_second']:.1f}" for v in data["variants"]]
    assert len(answers) == 3 and "wanted: </script><b>A cat & more</b>" in answers[0] and "什么是 LoRA" in answers[1]
    assert len(images) >= 2 and all(images)


def variants(tmp_path, *configs, **keys):
    paths = []
    for number, config in enumerate(configs):
        paths.append(tmp_path / f"c{number}.yaml")
        paths[-1].write_text(yaml.safe_dump({"model_name_or_path": "m", "use_kt": True, **config}, sort_keys=False))
    return plan_variants(paths, **keys)


def test_plan(tmp_path):
    """Sweeps are multiplied out. Variants that differ in adapters or generating keys share a model; others do not."""
    (tmp_path / "a").mkdir()
    adapter = str(tmp_path / "a")
    sweep = {"sweep": {"kt_num_threads": [1, 2], "adapter_name_or_path": [None, adapter]}, "do_sample": False}
    found = variants(tmp_path, sweep, {"kt_num_threads": 1, "temperature": 0.1})
    assert [v.name for v in found] == [
        "c0: kt_num_threads=1, adapter_name_or_path=null", "c0: kt_num_threads=1, adapter_name_or_path=a",
        "c0: kt_num_threads=2, adapter_name_or_path=null", "c0: kt_num_threads=2, adapter_name_or_path=a", "c1",
    ]  # fmt: skip
    assert [v.adapters for v in found] == [[], [adapter], [], [adapter], []]
    assert "sweep" not in found[0].config and "adapter_name_or_path" not in found[0].config
    assert [[v.name[-1] for v in group] for group in group_variants(found)] == [["l", "a", "1"], ["l", "a"]]
    plain = variants(tmp_path, {"use_kt": False}, {"use_kt": False, "adapter_name_or_path": adapter})
    assert len(group_variants(plain)) == 2, "adapters of stock chats cannot be exchanged"
    assert [v.part for v in variants(tmp_path, {"adapter_name_or_path": adapter}, ablate=True)] == [
        "off",
        "attention",
        "experts",
        "on",
    ]


@pytest.mark.parametrize(
    ("config", "keys", "message"),
    [
        ({}, {}, "nothing to compare it with"),
        ({"sweep": {"kt_num_threads": 3}}, {}, "a dictionary of keys with lists of values"),
        ({}, {"ablate": True}, "--ablate needs use_kt: true and an adapter"),
        ({}, {"overrides": ["x"]}, "expected key=value"),
    ],
)
def test_plans_that_make_no_sense(tmp_path, config, keys, message):
    with pytest.raises(KTConfigError, match=message):
        variants(tmp_path, config, **keys)


def test_an_adapter_without_effect_is_called_out():
    def measured(name, *texts):
        return VariantResult(name, [PromptResult(i, text, "", 1) for i, text in enumerate(texts)], 0, 1, 1, 0)

    base, adapter = Variant("base", {}), Variant("tuned", {"adapter_name_or_path": "a"})
    [warning] = warnings_about([base, adapter], [measured("base", "x", "y"), measured("tuned", "x", "y")])
    assert warning.startswith("base and tuned give the same answers to all 2 prompts, although their adapters differ.")
    assert not warnings_about([base, adapter], [measured("base", "x", "y"), measured("tuned", "x", "z")])
    assert not warnings_about([base, base], [measured("base", "x"), measured("base", "x")])
