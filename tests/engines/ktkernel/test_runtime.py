"""kt-kernel where it is missing, or was built for another CPU."""

from __future__ import annotations

import sys

import pytest
import torch
from transformers import AutoModelForCausalLM

from llamafactory_kt import KTExpertsConfig


def load(path, backend="torch", **keys):
    config = KTExpertsConfig(backend=backend)
    return AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, quantization_config=config, **keys)


def chat_model(path, **keys):
    from llamafactory.chat import ChatModel

    return ChatModel(
        {"model_name_or_path": str(path), "template": "deepseek", "use_kt": True, "do_sample": False, **keys}
    )


def test_kernel_missing_or_made_for_another_cpu(demo, monkeypatch, tmp_path):
    import kt_kernel.sft.amx

    from llamafactory_kt import KTKernelError
    from llamafactory_kt.engines.ktkernel import runtime
    from llamafactory_kt.tools.quantize import quantize_model

    monkeypatch.setattr(runtime, "missing_cpu_flags", lambda build="": ["amx_tile"] if build == "amx" else [])
    monkeypatch.setattr("kt_kernel.__cpu_variant__", "amx")
    with pytest.raises(KTKernelError, match=r"kt_backend: AMXBF16 cannot run here: this CPU lacks amx_tile"):
        chat_model(demo / "model", kt_backend="AMXBF16")
    monkeypatch.setattr("kt_kernel.__cpu_variant__", "avx2")
    monkeypatch.setitem(kt_kernel.sft.amx._SFT_METHOD_TO_CLASS, "AMXBF16_SFT", None)
    with pytest.raises(KTKernelError, match="kt-kernel's variant 'avx2' has no kernel for AMXBF16"):
        chat_model(demo / "model", kt_backend="AMXBF16")
    monkeypatch.setitem(sys.modules, "kt_kernel", None)
    with pytest.raises(KTKernelError, match="kt-kernel is not installed or does not load"):
        chat_model(demo / "model", kt_backend="AMXBF16")
    with pytest.raises(KTKernelError, match="pip install kt-kernel"):
        load(demo / "model", backend="AMXBF16")
    with pytest.raises(KTKernelError, match="cannot pack int8 weights here: kt-kernel is not installed"):
        quantize_model(demo / "model", tmp_path / "packed", "int8")
    assert not (tmp_path / "packed").exists()
    summary = load(demo / "model", backend="auto")._kt_summary
    assert summary["engine"] == "oneDNN"
    assert summary["reason"].startswith("AMXBF16 cannot run: kt-kernel is not installed")
