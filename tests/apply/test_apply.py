"""Adding an adapter to a loaded model."""

from __future__ import annotations

import pytest
import torch
from helpers.adapters import make_adapter
from helpers.foreign_adapters import (
    copied,
    ours,
)
from helpers.loading import answer, load
from helpers.models import make_model
from helpers.references import merged_float32, rel
from safetensors.torch import load_file, save_file

from llamafactory_kt import KTAdapterError, KTModelError, apply_adapter, load_moe_lora_from_adapter
from llamafactory_kt.model.state import kt_state

pytestmark = pytest.mark.usefixtures("worker_threads")


def test_an_adapter_that_touches_only_routers_is_applied_once(tmp_path):
    adapter = copied(tmp_path)
    (adapter / "kt_adapter_manifest.json").unlink()
    file = adapter / "adapter_model.safetensors"
    save_file({n: t for n, t in load_file(file).items() if ".mlp.gate." in n}, file)
    model, report = ours(adapter)
    assert report.total == report.experts + report.peft and not hasattr(model, "peft_config")
    with pytest.raises(KTModelError, match="already carries an adapter"):
        apply_adapter(model, adapter)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    root = tmp_path_factory.mktemp("files")
    model = make_model(root / "model", "deepseek_v2")
    return model, make_adapter(root / "a", model, rank=4), make_adapter(root / "b", model, rank=12, seed=7, naming="A")


def test_load_moe_lora_from_adapter_on_plain_and_wrapped_models(files):
    """A second call replaces the first adapter; a broken adapter changes nothing."""
    path, first, second = files
    plain = load(path, backend="torch")
    report = load_moe_lora_from_adapter(plain, first)
    assert report.layers == (1, 2) and report.experts == 2 * 6 * 3 * 2 and report.max_rank == 4
    experts_only = answer(plain)
    assert rel(experts_only, answer(merged_experts_only(path, first))) < 0.05
    load_moe_lora_from_adapter(plain, second)
    load_moe_lora_from_adapter(plain, first)
    assert torch.equal(answer(plain), experts_only)
    wrapped, _ = apply_adapter(load(path, backend="torch"), second)
    load_moe_lora_from_adapter(wrapped, first)
    with pytest.raises(KTAdapterError):
        load_moe_lora_from_adapter(wrapped, make_broken(first))
    assert [w.engine.lora_rank for w in kt_state(wrapped).wrappers] == [4, 4]


def merged_experts_only(path, adapter):
    import json
    import tempfile
    from pathlib import Path

    from safetensors.torch import load_file, save_file

    with tempfile.TemporaryDirectory() as folder:
        tensors = load_file(adapter / "adapter_model.safetensors")
        save_file({n: t for n, t in tensors.items() if ".experts." in n}, Path(folder) / "adapter_model.safetensors")
        (Path(folder) / "adapter_config.json").write_text(
            json.dumps(json.loads((adapter / "adapter_config.json").read_text()))
        )
        return merged_float32(path, Path(folder))


def make_broken(adapter):
    import shutil
    import tempfile
    from pathlib import Path

    from helpers.adapters import edit_adapter

    copy_of = Path(tempfile.mkdtemp()) / "broken"
    shutil.copytree(adapter, copy_of)

    def spoil(tensors):
        last = sorted(n for n in tensors if ".layers.2.mlp.experts." in n)[-1]
        tensors[last][0, 0] = float("nan")
        return tensors

    return edit_adapter(copy_of, spoil)
