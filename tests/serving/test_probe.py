"""What is found out about a server before it is started."""

from __future__ import annotations

import pytest
from helpers.sglang import interpreter

from llamafactory_kt import KTServerError
from llamafactory_kt.serving.options import discover


def test_servers_that_cannot_serve(tmp_path):
    with pytest.raises(KTServerError, match=r"no SGLang. Install sglang-kt"):
        discover(str(interpreter(tmp_path, tmp_path / "nothing")))
    with pytest.raises(KTServerError, match="an SGLang without KTransformers"):
        discover(str(interpreter(tmp_path, STANDIN_DIALECT="plain")))
    broken = tmp_path / "broken" / "sglang"
    broken.mkdir(parents=True)
    (broken / "__init__.py").write_text("raise ImportError('libcuda.so.1: cannot open shared object file')")
    with pytest.raises(KTServerError, match=r"cannot be imported by .*a venv/python: ImportError: libcuda.so.1"):
        discover(str(interpreter(tmp_path, broken.parent)))
