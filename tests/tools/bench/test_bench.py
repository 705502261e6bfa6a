"""One real run of ``llamafactory-kt bench``. Speeds are never asserted."""

from __future__ import annotations

import json

import pytest
import yaml
from helpers.children import KT, child

from llamafactory_kt.native.library import library


def test_a_real_run(tmp_path, demo):
    config = {
        "model_name_or_path": str(demo / "model"), "adapter_name_or_path": str(demo / "adapter"), "template": "deepseek",
        "use_kt": True, "kt_backend": "torch",
    }  # fmt: skip
    path = tmp_path / "c.yaml"
    path.write_text(yaml.safe_dump(config))
    words = [
        "--against", "stock", "--against", "kt_merge_adapter=true",
        "--no-base", "--prompt-tokens", "16,40", "--new-tokens", "3", "--rounds", "1",
    ]  # fmt: skip
    result = child(KT, "bench", path, "kt_router_stats=true", *words, "--json", "-")
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    configured, stock, merged = found["rows"]
    assert [row["name"] for row in found["rows"]] == ["as configured", "stock", "kt_merge_adapter=true"]
    assert configured["loaded"]["engine"].startswith("torch with ") and "for 40" in stock["loaded"]["engine"]
    assert configured["loaded"]["push"] > 0 and stock["loaded"]["push"] is merged["loaded"]["push"] is None
    files = sum(f.stat().st_size for f in (demo / "model").glob("*.safetensors"))
    for one in (configured, stock):
        assert set(one["prefill"]) == set(one["decode"]) == {"16", "40"}
        assert all(len(times) == 1 and min(times) > 0 for part in ("prefill", "decode") for times in one[part].values())
        loaded = one["loaded"]
        assert 2**27 < loaded["before"] <= loaded["resident"] <= loaded["peak_loading"] and one["peak"] > 2**27
        # Three layers, two of eight experts a token, in bfloat16.
        assert loaded["experts_per_token"] == 3 * 2 * 3 * 128 * 96 * 2
        assert (
            set(loaded["operations"])
            == set(loaded["cache"])
            == set(one["parts"])
            == set(one["peak_share"])
            == {"16", "40"}
        )
        assert loaded["operations"]["40"]["experts"] == 40 * loaded["experts_per_token"], (
            "two for each weight, of two bytes"
        )
        for found_parts in one["parts"].values():
            for forward in (found_parts["prompt"], found_parts["token"]):
                assert list(forward["parts"]) == ["attention", "linear", "experts", "output", "between"]
                assert all(0 < seconds < forward["total"] for seconds in forward["parts"].values())
        assert 0 < one["proportional"] < one["resident"], "libraries, at least, are shared"
    assert stock["turns"] == {} and set(configured["turns"]) == {"16", "40"} and configured["turns"]["40"][0][0] > 0
    # Keys of 48 and values of 32 numbers of four heads, or latents of 80 numbers, four layers; the last token is not in the cache.
    for row, heads in ((stock, 4), (configured, 4 if isinstance(library(), str) else 1)):
        assert row["loaded"]["cache"] == {"16": 80 * heads * 4 * 2 * 20, "40": 80 * heads * 4 * 2 * 44}
    assert stock["loaded"]["weights"] == pytest.approx(files, rel=0.01) and found["machine"]["checkpoint"] == files
    assert configured["loaded"]["weights"] >= stock["loaded"]["weights"] + 2 * (60_672 + 129_024), "and its LoRA"
    assert configured["loaded"]["others_per_token"] == stock["loaded"]["others_per_token"], "the same model"
    assert configured["loaded"]["lora_per_token"] > 2 * 60_672 and stock["loaded"]["lora_per_token"] == 0
    turns = 3 * 2 * (1 + 1)
    assert len(found["machine"]["bandwidth"]) == len(found["machine"]["products"]) == 1 + 2 * turns
    assert "decode speed after 40" in found["ratios"]["stock"]["as configured"]
