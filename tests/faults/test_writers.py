"""Writers where writes fail: a full disk, a limit of file sizes, a kill in the middle. Each either writes all of its output or says in one
paragraph why not, leaves nothing incomplete, and removes what killed runs have left."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from helpers.adapters import make_adapter
from helpers.marks import needs_kernel
from helpers.models import make_model

from llamafactory_kt import KTModelError, KTOutputError, KTPathError
from llamafactory_kt.adapters import open_adapter
from llamafactory_kt.adapters.uniform import Uniform
from llamafactory_kt.adapters.writing import WRITERS, write_moe_lora, write_stacked
from llamafactory_kt.engines.ktkernel.methods import Method
from llamafactory_kt.engines.ktkernel.packed_files import LayerRecord, check_written, expected_files
from llamafactory_kt.ground.atomic_output import replacing, temporary_directory, writing
from llamafactory_kt.tools.merge import merge_adapter

LEAST, STEP = 64, 1.6


@pytest.fixture
def most():
    """Sets the most bytes that a file may have, as ``ulimit -f`` does, for this test."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return make_model(tmp_path_factory.mktemp("model") / "model", "deepseek_v2")


@pytest.fixture(scope="module")
def adapter(model) -> Path:
    return make_adapter(model.parent / "adapter", model, rank=3)


def limits(file: Path):
    """Sizes at which writing ends: in the header, in the values, and in the last bytes."""
    whole, size = file.stat().st_size, LEAST
    while size < whole:
        yield size
        size = int(size * STEP) + 1
    yield whole - 1


def check_paragraph(error: BaseException, output: Path) -> None:
    text = str(error)
    assert (
        text.startswith(f"{output} could not be written (") and "are free on its disk" in text and "ulimit -f" in text
    )
    assert "\n" not in text and not list(output.parent.iterdir()), "nothing is left"


@pytest.mark.parametrize("kind", [*WRITERS, "moe_lora.pt", "x.safetensors"])
def test_convert(kind, model, adapter, tmp_path, most):
    write = {"moe_lora.pt": write_moe_lora, "x.safetensors": write_stacked}.get(kind) or WRITERS[kind]
    uniform = Uniform.of(open_adapter(adapter))
    output = tmp_path / "out" / kind
    write(uniform, tmp_path / "whole" / kind)
    whole = tmp_path / "whole" / kind
    largest = max((whole, *whole.rglob("*")), key=lambda file: file.stat().st_size if file.is_file() else 0)
    for size in limits(largest):
        most(size)
        with pytest.raises(KTOutputError) as caught:
            write(uniform, output)
        check_paragraph(caught.value, output)


def test_merge(model, adapter, tmp_path, most):
    for size in (100, 30_000, (model / "model.safetensors").stat().st_size - 1):
        most(size)
        with pytest.raises(KTOutputError) as caught:
            merge_adapter(model, adapter, tmp_path / "out" / "merged")
        check_paragraph(caught.value, tmp_path / "out" / "merged")


@needs_kernel
@pytest.mark.nightly
def test_quantize(model, tmp_path, most, worker_threads):
    """kt-kernel itself says nothing, and writes files that are too short."""
    from llamafactory_kt.tools.quantize import quantize_model

    quantize_model(model, tmp_path / "whole", "amxint8")
    sizes = sorted({file.stat().st_size for file in (tmp_path / "whole").rglob("*.kt")})
    most(sizes[-1] - 1)
    with pytest.raises(KTOutputError, match=r"_layer_1 could not be written \(\d+ of \d+ files are incomplete, first "):
        quantize_model(model, tmp_path / "out", "amxint8")
    assert not list((tmp_path / "out").iterdir())


@needs_kernel
@pytest.mark.nightly
def test_quantize_packs_layers_again_that_an_earlier_version_recorded_as_complete(model, tmp_path, worker_threads):
    from llamafactory_kt.tools.quantize import quantize_model

    quantize_model(model, tmp_path / "out", "amxint8")
    file = next((tmp_path / "out" / "_layer_1").rglob("*quant_.kt"))
    whole, record = file.read_bytes(), tmp_path / "out" / "_layer_1" / "layer.json"
    file.write_bytes(whole[:100])
    content = json.loads(record.read_text())
    content["files"][str(file.relative_to(record.parent))]["size"] = 100
    record.write_text(json.dumps(content))
    report = quantize_model(model, tmp_path / "out", "amxint8")
    assert (report.layers, report.kept) == (1, 1) and file.read_bytes() == whole


def test_half_a_layer_is_not_recorded(tmp_path):
    """What kt-kernel leaves on a full disk: files of half the size that their names tell, and some that are missing."""
    method, record = Method("AMXINT8", 8, 64), LayerRecord("AMXINT8", 1, 2, 128, 64, "fingerprint")
    files = expected_files(record, method)
    for name, facts in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(bytes(facts["size"]))
    check_written(tmp_path, record, method)
    assert len(files) == 2 * 3 * 2
    for spoil in (lambda file: file.write_bytes(b"x"), Path.unlink):
        spoil(tmp_path / list(files)[5])
        with pytest.raises(OSError, match="1 of 12 files are incomplete, first _numa_0/INT8_"):
            check_written(tmp_path, record, method)


@pytest.fixture
def small_disk(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=600k", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("no file system can be mounted here")
    yield disk
    subprocess.run(["umount", "-l", disk], check=True)


def test_a_full_disk(model, adapter, small_disk):
    uniform = Uniform.of(open_adapter(adapter))
    (small_disk / "filler").write_bytes(bytes(580 * 1024))
    for write, name in [(write_moe_lora, "moe_lora.pt"), (write_stacked, "x.safetensors"), (WRITERS["peft"], "peft")]:
        with pytest.raises(KTOutputError, match=r"could not be written \(.*; .* are free on its disk\)"):
            write(uniform, small_disk / "out" / name)
    with pytest.raises(KTModelError, match="free there; choose another output"):
        merge_adapter(model, adapter, small_disk / "out" / "merged")
    assert not list((small_disk / "out").iterdir())


WAYS = {
    "torch.save": lambda file: torch.save({"a": torch.ones(9000)}, file),
    "safetensors": lambda file: __import__("safetensors.torch").torch.save_file({"a": torch.ones(9000)}, file),
    "text": lambda file: file.write_text("x" * 30_000),
    "figure": lambda file: (
        __import__("matplotlib.figure").figure.Figure(figsize=(9, 9)).savefig(file, format="png", dpi=200)
    ),
    "yaml": lambda file: file.write_text("key: value\n" * 4000),
    "tokenizer": lambda file: file.mkdir() or tokenizer().save_pretrained(file),
    "missing folder": lambda file: (file.parent / "nothing" / "x").write_text(""),
}


def tokenizer():
    from llamafactory_kt.tools.bench.synthetic import _byte_tokenizer

    return _byte_tokenizer()


@pytest.mark.parametrize("way", WAYS)
def test_whoever_writes(way, tmp_path, most):
    (tmp_path / "out").mkdir()
    most(700)
    with pytest.raises(KTOutputError) as caught, replacing(tmp_path / "out" / "x") as temporary:
        WAYS[way](temporary)
    check_paragraph(caught.value, tmp_path / "out" / "x")


def test_other_errors_stay_what_they_are(tmp_path):
    for error in (KeyboardInterrupt(), KTPathError("not there"), ValueError("no such thing"), MemoryError()):
        with pytest.raises(type(error)) as caught, replacing(tmp_path / "x"):
            raise error
        assert caught.value is error and not list(tmp_path.iterdir())


def test_a_file_in_the_place_of_a_directory(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(KTOutputError, match=r"could not be written \("), replacing(tmp_path / "file" / "x" / "y"):
        pass
    with pytest.raises(KTOutputError), replacing(tmp_path / "file") as temporary:
        temporary.mkdir()
    assert (tmp_path / "file").read_text() == "mine" and len(list(tmp_path.iterdir())) == 1


def test_answers_are_whole_lines(tmp_path, most):
    from llamafactory_kt.integration.prompts import Prompt
    from llamafactory_kt.tools.experiments.answers import AnswerFile

    rows = [Prompt(index=index, messages=[{"role": "user", "content": "?"}], row={"n": index}) for index in range(2)]
    file = AnswerFile(tmp_path / "answers.jsonl", rows, {})
    answers = [answer_to(0), answer_to(1)]
    file.add(answers[:1])
    most(file.path.stat().st_size + 50)
    before = file.path.read_bytes()
    with pytest.raises(KTOutputError):
        file.add(answers[1:])
    assert file.path.read_bytes() == before and set(file.lines) == {0}


def answer_to(index: int):
    from llamafactory_kt.tools.experiments.generating import Answer

    return Answer(index=index, text="x" * 30, prompt_tokens=1, answer_tokens=1, ms_per_token=1.0, finish_reason="stop")


KILLED = (
    "import os, sys, time\nfrom pathlib import Path\nfrom llamafactory_kt.ground.atomic_output import replacing\n"
    "with replacing(Path(sys.argv[1])) as temporary:\n"
    "    temporary.mkdir(); (temporary / 'half').write_text('half'); print('there', flush=True); time.sleep(60)\n"
)


def started(path: Path) -> subprocess.Popen:
    process = subprocess.Popen([sys.executable, "-c", KILLED, path], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "there\n"
    return process


def test_what_killed_runs_left_is_removed_and_what_others_write_is_not(tmp_path):
    dead, alive = started(tmp_path / "one"), started(tmp_path / "two")
    try:
        dead.kill()
        dead.wait()
        assert len(list(tmp_path.glob(".*.????????"))) == 2
        (tmp_path / ".cache.abcdefgh").mkdir()  # not ours
        with replacing(tmp_path / "three") as temporary:
            temporary.write_text("whole")
        names = {path.name.rpartition(".")[0] or path.name for path in tmp_path.iterdir()}
        assert names == {".two", ".cache", "three"}
    finally:
        alive.kill()
        alive.wait()
    with temporary_directory("llamafactory-kt-x-", tmp_path):
        assert not list(tmp_path.glob(".two.*"))
    assert sorted(path.name for path in tmp_path.iterdir()) == [".cache.abcdefgh", "three"]


@pytest.mark.nightly
def test_merge_killed_anywhere(model, adapter, tmp_path):
    """A killed merge leaves no output, and the next one nothing hidden."""
    words = [
        sys.executable,
        "-m",
        "llamafactory_kt",
        "merge",
        "--model",
        model,
        "--adapter",
        adapter,
        "--output",
        tmp_path / "merged",
    ]
    for wait in (0.0, 0.02, 0.05, 0.1):
        process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while process.poll() is None and not list(tmp_path.iterdir()):
            time.sleep(0.001)
        time.sleep(wait)
        os.kill(process.pid, signal.SIGKILL)
        if process.wait() == 0:
            break
        assert not (tmp_path / "merged").exists()
    assert (tmp_path / "merged").exists() or subprocess.run(words).returncode == 0
    assert [path.name for path in tmp_path.iterdir()] == ["merged"]


@pytest.mark.nightly
def test_commands_end_in_one_paragraph(model, adapter, tmp_path):
    for command in (
        ["merge", "--model", model, "--adapter", adapter, "--output", tmp_path / "x"],
        ["convert", "--input", adapter, "--output", tmp_path / "moe_lora.pt"],
    ):
        run = subprocess.run(
            [sys.executable, "-m", "llamafactory_kt", *command], capture_output=True, text=True,
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000)),
        )  # fmt: skip
        (line,) = [line for line in run.stderr.splitlines() if line.startswith("Error: ")]
        assert run.returncode == 1 and "could not be written (" in line and "Traceback" not in run.stderr
    assert not list(tmp_path.iterdir())


def test_writing_beside_others(tmp_path):
    with pytest.raises(KTOutputError), writing(tmp_path):
        (tmp_path / "none" / "x").write_text("")
