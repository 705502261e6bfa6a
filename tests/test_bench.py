"""bench of configurations: its arithmetic on made-up figures, and one real run. Speeds are never asserted."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import yaml

from llamafactory_kt import KTConfigError
from llamafactory_kt.bench.engine import Measured, bench, ratio, variants
from llamafactory_kt.cli.bench import _show_engines

CONFIG = {"model_name_or_path": "m", "adapter_name_or_path": "a", "use_kt": True, "kt_backend": "torch"}


def test_variants():
    found = variants(CONFIG, ["base", "stock", "kt_num_threads=4", "kt_debug=true"])
    assert found["as configured"] == CONFIG and "adapter_name_or_path" not in found["base"]
    assert found["stock"] == {"model_name_or_path": "m"}
    assert found["kt_num_threads=4"]["kt_num_threads"] == 4 and found["kt_debug=true"]["kt_debug"] is True
    with pytest.raises(KTConfigError, match="unknown word 'fast', expected base, stock or key=value"):
        variants(CONFIG, ["fast"])


def test_ratios_are_of_the_same_round(capsys):
    """The machine was twice as slow in the second round; the ratio does not see that."""
    slow, fast = [0.2, 0.4, 0.2], [0.1, 0.2, 0.1]
    assert ratio(fast, slow) == 2.0 and ratio(slow, fast) == 0.5
    _show_engines(
        [
            Measured("as configured", 1.0, 2**30, 0, {128: slow}, {128: slow}),
            Measured("stock", 2.0, 2**31, 2**30, {128: fast}, {128: fast}),
        ]
    )
    text = " ".join(capsys.readouterr().out.split())
    assert "200 ms" in text and "100 ms" in text and "10.0" in text and "2.00" in text and "1.0 GiB" in text


def test_a_real_run(tmp_path, demo):
    config = {
        "model_name_or_path": str(demo / "model"), "adapter_name_or_path": str(demo / "adapter"), "template": "deepseek",
        "use_kt": True, "kt_backend": "torch",
    }  # fmt: skip
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump(config))
    words = ["--against", "kt_router_stats=true", "--prompt-tokens", "16,40", "--new-tokens", "3", "--rounds", "2"]
    result = subprocess.run(
        [sys.executable, "-m", "llamafactory_kt", "bench", path, *words, "--json"], capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout[result.stdout.index("[") :])
    assert [one["name"] for one in found] == ["as configured", "kt_router_stats=true"]
    for one in found:
        assert set(one["prefill"]) == set(one["decode"]) == {"16", "40"} and one["memory"] > 2**27
        assert all(len(times) == 2 and min(times) > 0 for part in ("prefill", "decode") for times in one[part].values())


def test_a_configuration_that_cannot_be_loaded(tmp_path):
    with pytest.raises(KTConfigError, match=r"cannot be measured: .*model_name_or_path: .*/none does not exist"):
        bench({"x": {**CONFIG, "model_name_or_path": str(tmp_path / "none"), "adapter_name_or_path": None}})
