"""One real run of ``llamafactory-kt bench``. Speeds are never asserted."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import yaml


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
