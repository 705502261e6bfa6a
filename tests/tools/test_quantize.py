"""``llamafactory-kt quantize`` with kt-kernel's methods. ``engines/test_integer_files.py`` has those of this package."""

from __future__ import annotations

import subprocess
import sys

import pytest
from helpers.children import KT, child
from helpers.loading import load
from helpers.marks import needs_kernel
from helpers.models import make_model
from helpers.quantized import quantized_model

from llamafactory_kt import KTConfigError, KTModelError, KTPathError
from llamafactory_kt.tools.quantize import quantize_model

pytestmark = [needs_kernel, pytest.mark.usefixtures("worker_threads")]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return quantized_model(tmp_path_factory.mktemp("packed"))


def test_an_interrupted_run_is_continued_to_the_same_bytes(files, tmp_path):
    root, path, _ = files
    output = tmp_path / "int8"
    killed = (
        "import os, sys\nfrom llamafactory_kt.tools.quantize import parts, quantize_model\nwrite = parts.write_record\n"
        "def once(*given):\n    if output_exists(): os.kill(os.getpid(), 9)\n    write(*given)\n"
        "def output_exists(): return os.path.isdir(sys.argv[2] + '/_layer_1')\n"
        "parts.write_record = once\n"
        "if __name__ == '__main__': quantize_model(sys.argv[1], sys.argv[2], 'amxint8')\n"
    )
    (tmp_path / "killed.py").write_text(killed)
    result = subprocess.run([sys.executable, tmp_path / "killed.py", path, output], capture_output=True, text=True)
    assert result.returncode == -9, result.stderr
    assert (output / "_layer_1" / "layer.json").is_file() and not (output / "_layer_2").exists()
    report = quantize_model(path, output, "amxint8")
    assert (report.layers, report.kept) == (1, 1)
    found, wanted = ({f.relative_to(r): f.read_bytes() for f in r.rglob("*.kt")} for r in (output, root / "int8"))
    assert found == wanted and len(found) == 2 * 6 * 6
    assert sorted(p.name for p in output.iterdir()) == ["_layer_1", "_layer_2"], "nothing is left of what was killed"


@pytest.fixture
def packed(files, tmp_path):
    """A copy of the INT8 weights to spoil."""
    import shutil

    return shutil.copytree(files[0] / "int8", tmp_path / "packed")


def test_another_model_into_the_same_directory(packed, tmp_path):
    other = make_model(tmp_path / "other", "deepseek_v2", seed=5)
    with pytest.raises(
        KTModelError, match=r"_layer_1 holds another model's or another method's weights \(method AMXINT8"
    ):
        quantize_model(other, packed, "AMXINT8")


def test_what_is_asked_for_wrongly(files, tmp_path, monkeypatch):
    with pytest.raises(KTConfigError, match="unknown value 'int3', expected one of int8, int4, amxint8, amxint4"):
        quantize_model(files[1], tmp_path / "o", "int3")
    with pytest.raises(KTPathError, match="is not a directory with safetensors files"):
        quantize_model(tmp_path, tmp_path / "o")
    with pytest.raises(
        KTConfigError, match=r"--dense is for --method int8 and int4; kt-kernel's files \(amxint8\) have"
    ):
        quantize_model(files[1], tmp_path / "o", "amxint8", dense="same")
    with pytest.raises(
        KTConfigError,
        match=r"AMXINT8 needs weight_path; .* --method amxint8 makes it\. AMXINT4, INT8, INT4 can do without",
    ):
        load(files[1], backend="AMXINT8")
    with pytest.raises(KTConfigError, match="weight_path is for backend: AMXINT8, AMXINT4, INT8, INT4; with AMXBF16"):
        load(files[1], backend="AMXBF16", weight_path=str(files[0] / "int8"))
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("", (), {"free": 1000})())
    with pytest.raises(KTModelError, match=r"needs .* and 1\.0 KiB are free there"):
        quantize_model(files[1], tmp_path / "o", "amxint8")
    assert not (tmp_path / "o").exists()


def test_command(files, tmp_path):
    words = ["--model", files[1], "--output", tmp_path / "o", "--method", "AMXInt4"]
    result = child(KT, "quantize", *words)
    assert result.returncode == 0 and "2 layers packed as AMXINT4" in result.stdout, result.stderr
    result = child(KT, "quantize", *words)
    assert result.returncode == 0 and "0 layers packed as AMXINT4, 2 were there already" in result.stdout
