"""The rows of a bench: configurations, and what they are compared with."""

from __future__ import annotations

import pytest

from llamafactory_kt import KTConfigError
from llamafactory_kt.tools.bench.configs import bench_configs

CONFIG = {"model_name_or_path": "m", "adapter_name_or_path": "a", "use_kt": True, "kt_backend": "torch"}


def test_bench_configs():
    found = {row.name: row for row in bench_configs(CONFIG, ["stock", "kt_num_threads=4", "kt_debug=true", "base"])}
    assert list(found) == ["as configured", "base", "stock", "kt_num_threads=4", "kt_debug=true"]
    assert found["as configured"].loaded_config == CONFIG and "adapter_name_or_path" not in found["base"].loaded_config
    assert found["stock"].loaded_config == {"model_name_or_path": "m"} and found["stock"].config == CONFIG
    assert found["kt_num_threads=4"].config["kt_num_threads"] == 4 and found["kt_debug=true"].config["kt_debug"] is True
    assert [row.name for row in bench_configs(CONFIG, base=False)] == ["as configured"]
    assert [row.name for row in bench_configs({"model_name_or_path": "m"})] == ["as configured"], (
        "no adapter to leave out"
    )
    both = bench_configs(CONFIG, ["kt_backend=INT4 kt_dense=int4"])[-1].config
    assert (both["kt_backend"], both["kt_dense"]) == ("INT4", "int4")
    with pytest.raises(KTConfigError, match="unknown word 'fast', expected base, stock or key=value"):
        bench_configs(CONFIG, ["fast"])
