"""A mapped file of weights that is cut short, written to, replaced or removed while the kernels read it."""

from __future__ import annotations

import signal

import pytest
from helpers.children import child

from llamafactory_kt.native.library import library

pytestmark = pytest.mark.skipif(isinstance(library(), str), reason=str(library()))
WEIGHTS = """
    import mmap, os, warnings
    from pathlib import Path
    import torch
    from llamafactory_kt.native import calls
    from llamafactory_kt.native.mapped import MappedFile

    warnings.simplefilter("ignore")  # the mapping cannot be written
    path = Path({path!r})

    def load():
        path.write_bytes(torch.rand(1000, 1000).numpy().tobytes())
        mapping = mmap.mmap(os.open(path, os.O_RDONLY), 0, access=mmap.ACCESS_READ)
        weight = torch.frombuffer(mapping, dtype=torch.float32).view(1000, 1000)
        return weight, MappedFile(path, weight.data_ptr(), weight.nbytes)

    def compute(weight):
        return calls.linear(torch.ones(1, 1000), weight, None, None, None, 2)[0]
"""
CHANGES = {
    "os.truncate(path, 4096 * 500)": "cut short 512",  # so many rows are as before
    "path.open('r+b').write(bytes(4_000_000))": "written to 0",
    "os.system(f'cp /dev/null {path}')": "cut short 0",
    "path.with_name('new').write_bytes(b''); path.with_name('new').replace(path)": "None 1000",
    "path.unlink()": "None 1000",
}


def test_a_file_that_changes(tmp_path):
    """The process goes on, and knows."""
    code = """
    for change in {changes!r}:
        weight, file = load()
        before = compute(weight)
        assert file.problem() is None
        exec(change)
        same = (compute(weight) == before).sum().item()
        problem = file.problem()
        print(problem and problem.split(" was ")[1].split(" while ")[0], same)
    """
    done = child((WEIGHTS + code).format(path=str(tmp_path / "weights"), changes=list(CHANGES)))
    assert done.stdout.splitlines() == list(CHANGES.values()), done.stdout + done.stderr


def test_other_bus_errors_end_the_process_as_before(tmp_path):
    code = """
    import faulthandler
    faulthandler.enable()
    weight, file = load()
    file.close()
    os.truncate(path, 0)
    compute(weight)
    """
    done = child((WEIGHTS + code).format(path=str(tmp_path / "weights")))
    # a second thread's error may end the process in the middle of the message
    assert done.returncode == -signal.SIGBUS and done.stderr.startswith("Fatal Python error: "), done.stderr


def test_a_model_whose_file_is_cut_short_gives_no_answer(tmp_path):
    code = """
    import torch
    from helpers.loading import load
    from helpers.models import make_model
    from llamafactory_kt import KTModelError
    path = make_model(Path({path!r}), "qwen3_moe")
    model = load(path, "native", load="mmap")
    ids = torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        model(ids)
        for file in path.glob("*.safetensors"):
            os.truncate(file, file.stat().st_size // 2)
        try:
            model(ids)
        except KTModelError as error:
            print(error)
    """
    imports = "\n    import os\n    from pathlib import Path"
    done = child((imports + code).format(path=str(tmp_path / "model")))
    assert "model.safetensors was cut short while its weights were in use" in done.stdout, done.stdout + done.stderr


def test_nothing_is_said_when_python_ends(tmp_path):
    """A cycle is taken apart after the modules' names are gone."""
    file = tmp_path / "weights"
    file.write_bytes(bytes(8192))
    code = f"""
    import mmap, pathlib
    import llamafactory_kt.native.mapped as mapped
    path = pathlib.Path({str(file)!r})
    file = path.open("rb")
    memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    mapped.kept = [*mapped.watch([path]), mapped]
    assert len(mapped.kept) > 1
    """
    done = child(code)
    assert (done.returncode, "TypeError" in done.stderr) == (0, False), done.stderr
