"""``llamafactory-kt stats``: its files agree with the counts, which other tests compare with stock routers."""

from __future__ import annotations

import csv
import json

import numpy as np
import pytest
import torch
import yaml
from typer.testing import CliRunner

from llamafactory_kt import KTAdapterError, KTConfigError, KTDataError
from llamafactory_kt.adapters import open_adapter
from llamafactory_kt.adapters.inspection import inspect_adapter
from llamafactory_kt.cli import app
from llamafactory_kt.tools.experiments.usage import count_usage, split_prompts

ROWS = [
    {"instruction": "Hello, who are you?", "lang": "en"}, {"instruction": "什么是 LoRA？", "lang": "zh/cn"},
    {"instruction": "Tell me a joke.", "lang": "en"},
]  # fmt: skip


@pytest.fixture(scope="module")
def files(tmp_path_factory, demo):
    root = tmp_path_factory.mktemp("stats")
    keys = {
        "model_name_or_path": str(demo / "model"), "adapter_name_or_path": str(demo / "adapter"),
        "template": "deepseek", "use_kt": True, "kt_backend": "torch", "do_sample": False, "max_new_tokens": 8,
    }  # fmt: skip
    (root / "config.yaml").write_text(yaml.safe_dump(keys))
    (root / "prompts.jsonl").write_text("\n".join(json.dumps(row) for row in ROWS))
    return root, keys


def words(root, output, *more):
    return [
        "stats",
        str(root / "config.yaml"),
        "--prompts",
        str(root / "prompts.jsonl"),
        "--output",
        str(output),
        *more,
    ]


def test_files_agree(files, demo):
    root, _ = files
    output = root / "out"
    result = CliRunner().invoke(app, words(root, output, "--split-by", "lang"))
    assert result.exit_code == 0, result.output
    found = json.loads((output / "stats.json").read_text())
    total = {entry["layer"]: np.array(entry["counts"]) for entry in found["layers"]}
    assert found["prompts"] == 3 and set(found["groups"]) == {"en", "zh/cn"} and set(total) == {1, 2, 3}
    for layer, counts in total.items():
        parts = [e["counts"] for group in found["groups"].values() for e in group if e["layer"] == layer]
        assert np.sum(parts, axis=0).tolist() == counts.tolist() and counts.sum() > 0
    frequency = torch.load(output / "experts_frequency.pt", weights_only=True)["logical_count"]
    assert frequency.shape == (1, 4, 8) and frequency[0, 0].sum() == 0, "the dense layer"
    assert all(frequency[0, layer].tolist() == counts.tolist() for layer, counts in total.items())
    norms = inspect_adapter(open_adapter(demo / "adapter"), values=True).norms
    for entry in found["adapter"]:
        layer = entry["layer"]
        assert entry["norms"] == pytest.approx(norms[layer])
        assert entry["correlation"] == pytest.approx(np.corrcoef(total[layer], norms[layer])[0, 1])
    rows = [row for row in csv.DictReader((output / "stats.csv").open()) if row["group"] == ""]
    assert len(rows) == 3 * 8
    for row in rows:
        layer, expert = int(row["layer"]), int(row["expert"])
        assert int(row["prompt_tokens"]) + int(row["answer_tokens"]) == total[layer][expert]
    pictures = {path.name for path in output.glob("*.png")}
    assert pictures == {"experts.png", "experts_lora.png", "experts_0_en.png", "experts_1_zh_cn.png"}
    assert all((output / name).read_bytes().startswith(b"\x89PNG") for name in pictures)
    again = CliRunner().invoke(app, words(root, output))
    assert isinstance(again.exception, KTAdapterError) and "not empty" in str(again.exception)


def test_what_cannot_be_counted(files):
    _, keys = files
    from llamafactory_kt.integration.prompts import convert

    prompts = [convert(index, row) for index, row in enumerate([*ROWS, {"instruction": "x"}])]
    with pytest.raises(KTDataError, match="rows 3 have no field 'lang'"):
        split_prompts(prompts, "lang")
    with pytest.raises(KTConfigError, match="needs use_kt: true"):
        count_usage({**keys, "use_kt": False}, prompts)
    with pytest.raises(KTDataError, match="none of the 1 prompts could be answered; the first error is: a row must be"):
        count_usage(keys, [convert(0, 3)])
