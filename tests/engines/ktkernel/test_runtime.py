"""Where kt-kernel is missing or was built for another CPU."""

from __future__ import annotations

import sys

import pytest
from helpers.chats import chat_model
from helpers.loading import load

from llamafactory_kt.model.state import kt_state


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
    with pytest.raises(KTKernelError, match="pip install 'kt-kernel"):
        load(demo / "model", "AMXBF16")
    with pytest.raises(KTKernelError, match="AMXINT8 cannot pack weights here: kt-kernel is not installed"):
        quantize_model(demo / "model", tmp_path / "packed", "amxint8")
    assert not (tmp_path / "packed").exists()
    state = kt_state(load(demo / "model"))
    assert state.engine.name == "native"
    assert state.reason.startswith("AMXBF16 cannot run: kt-kernel is not installed")
