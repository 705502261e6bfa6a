"""Long beginnings that survive a restart: the same numbers, and nothing of a damaged or foreign file."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import textwrap

import pytest
import torch
from helpers.loading import load
from helpers.marks import needs_native
from helpers.models import make_model
from transformers import GenerationConfig

from llamafactory_kt.decoding.generate import generate, keep_prompts
from llamafactory_kt.decoding.optimize import optimize_for_inference
from llamafactory_kt.model.state import kt_state

HEAD = 70


class Reading:
    cached_tokens = 0

    def read(self, tokens: int) -> bool:
        return True


@pytest.fixture
def tokens():
    generator = torch.Generator().manual_seed(1)
    return lambda count: torch.randint(2, 1000, (count,), generator=generator).tolist()


def start(path, directory, **keys):
    """A new process would do the same."""
    model = load(path, "torch", dtype=keys.pop("dtype", torch.float32), **keys)
    optimize_for_inference(model)
    keep_prompts(kt_state(model), gib=1, directory=directory)
    return model


def ask(model, ids, head=HEAD, kept=True):
    config, reading = GenerationConfig(max_new_tokens=5, do_sample=False, pad_token_id=1), Reading()
    config.eos_token_id = None

    def custom(*args, **kwargs):
        return generate(*args, reading=reading, head=head, **kwargs)

    given = {"custom_generate": custom} if kept else {}
    found = model.generate(inputs=torch.tensor([ids]), generation_config=config, **given)
    return found[0].tolist(), reading.cached_tokens


@pytest.mark.parametrize("name, changes", [("qwen3_moe", {}), ("deepseek_v2", {})])
def test_beginnings_survive(tmp_path, tokens, cache, name, changes):
    path, directory = make_model(tmp_path / "model", name, dtype=torch.float32, **changes), tmp_path / "kept"
    head = tokens(HEAD)
    model = start(path, directory)
    first = [*head, *tokens(20)]
    assert ask(model, first)[1] == 0
    [file] = directory.iterdir()
    written = file.stat().st_mtime_ns
    ask(model, [*head, *tokens(9)])
    assert file.stat().st_mtime_ns == written, "once"

    model = start(path, directory)
    second = [*head, *tokens(20)]
    found, cached = ask(model, second)
    assert cached == HEAD and found == ask(model, second, kept=False)[0]
    assert ask(model, [*head, *tokens(20)])[1] == HEAD, "from memory now"
    assert ask(start(path, directory), [*head[:-1], 5, *tokens(9)])[1] == 0, "another token"


@needs_native
def test_keys_and_values_of_eight_bits(tmp_path, tokens, cache):
    path, directory = make_model(tmp_path / "model", "qwen3_moe"), tmp_path / "kept"
    prompt = tokens(90)
    keys = {"dtype": torch.bfloat16, "cache": "int8"}
    whole = ask(start(path, directory, **keys), prompt)[0]
    model = start(path, directory, **keys)
    found, cached = ask(model, prompt)
    assert cached == HEAD and found == whole
    assert ask(start(path, directory, dtype=torch.bfloat16), prompt)[1] == 0, "the other cache is another thing"


def test_damaged_and_foreign_files(tmp_path, tokens, cache, kt_log):
    path, directory = make_model(tmp_path / "model", "qwen3_moe", dtype=torch.float32), tmp_path / "kept"
    prompt = tokens(90)
    ask(start(path, directory), prompt)
    [file] = directory.iterdir()
    whole = file.read_bytes()
    for content, what in (
        (whole[:-100], "bytes"),
        (whole[:-8] + bytes(8), "its checksum is wrong"),
        (b"", "bytes"),
    ):
        file.write_bytes(content)
        kt_log.clear()
        assert ask(start(path, directory), prompt)[1] == 0
        [record] = [record for record in kt_log.records if record.levelno == logging.WARNING]
        assert what in record.getMessage() and str(file) in record.getMessage()
        assert file.read_bytes() == whole, "written again"
    os.utime(next(path.glob("*.safetensors")))
    assert ask(start(path, directory), prompt)[1] == 0, "the weights may be others"
    assert len(list(directory.iterdir())) == 2


def test_a_directory_that_cannot_be_written(tmp_path, tokens, cache, kt_log):
    path = make_model(tmp_path / "model", "qwen3_moe", dtype=torch.float32)
    (tmp_path / "file").write_text("")
    assert len(ask(start(path, tmp_path / "file"), tokens(90))[0]) == 95
    assert "The beginning of the prompt is not kept in" in kt_log.text


def test_the_least_recently_used_go(tmp_path, tokens, cache):
    path, directory = make_model(tmp_path / "model", "qwen3_moe", dtype=torch.float32), tmp_path / "kept"
    model = start(path, directory)
    prompts = [tokens(90) for _ in range(3)]
    ask(model, prompts[0])
    [first] = directory.iterdir()
    kt_state(model).prompts.most_nbytes = int(2.5 * first.stat().st_size)
    ask(model, prompts[1])
    os.utime(first, (1, 1))
    ask(model, prompts[2])
    assert len(list(directory.iterdir())) == 2 and not first.exists()


def test_killed_while_it_writes(tmp_path, tokens, cache):
    """What is there is whole, and the next process removes what is not."""
    path, directory = make_model(tmp_path / "model", "qwen3_moe", dtype=torch.float32), tmp_path / "kept"
    script = textwrap.dedent(f"""
        import os, signal, sys
        from pathlib import Path
        sys.path.insert(0, {os.path.dirname(__file__)!r})
        sys.path.insert(0, {os.path.dirname(os.path.dirname(__file__))!r})
        from llamafactory_kt.prompt_cache import files
        import test_files
        stock = files.write_safetensors
        def write(*args):
            stock(*args)
            os.kill(os.getpid(), signal.SIGKILL)
        files.write_safetensors = write
        test_files.ask(test_files.start(Path({str(path)!r}), Path({str(directory)!r})), list(range(2, 92)))
    """)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not list(directory.glob("*.safetensors"))
    ask(start(path, directory), list(range(2, 92)))
    assert [file.suffix for file in directory.iterdir()] == [".safetensors"]
