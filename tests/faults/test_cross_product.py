"""No wrong number without a message: of each adapter that PEFT makes, PEFT's own float32 answer, or a KTError before weights load.

The draws are the same on every run. A failure prints its seed and what was drawn; ``@example(seed)`` above a test runs that seed first.
``make test ARGS='-m nightly'`` draws hundreds.
"""

from __future__ import annotations

import contextlib
import re
import tempfile
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from helpers.drawn_adapters import Drawn, answer_of_peft, drawn, made, make_bases, relaid
from helpers.foreign_adapters import ours, stock
from helpers.loading import load, logits
from hypothesis import HealthCheck, Phase, event, example, given, reject, settings, strategies
from transformers import PreTrainedModel

from llamafactory_kt import KTError, switch_adapter
from llamafactory_kt.tools.merge import merge_adapter

SETTINGS = settings(
    deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck), phases=[Phase.explicit, Phase.generate],
)  # fmt: skip
SEEDS = strategies.integers(0, 2**32 - 1)
EXACT, ROUNDED = 2e-5, 0.1
REFUSED = {
    "init_lora_weights: (pissa|olora|corda|lora_ga|loftq)": "the base was changed, and the file does not say how",
    "sit on routed experts but are not": "experts trained as a whole, or their biases",
    "lora_magnitude_vector.weight is missing": "PEFT drops it when it converts an adapter to plain LoRA",
}
"""messages of what is refused though PEFT loads it -> why"""


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """name -> directory, and the logits of KT experts without an adapter"""
    made = make_bases(tmp_path_factory.mktemp("bases"))
    return {name: (path, logits(load(path, "torch", dtype=torch.float32))) for name, path in made.items()}


def error(found, wanted):
    """The largest of all tokens, relative in the Euclidean norm."""
    return float(((found - wanted).norm(dim=-1) / wanted.norm(dim=-1)).max())


def check(case: Drawn, bases, directory: Path) -> None:
    base, plain = bases[case.base]
    try:
        adapter, trained = made(case, base, directory)
    except Exception as problem:  # whatever PEFT raises for what it does not do
        event(f"PEFT: {type(problem).__name__}")
        reject()
    answers, loads, merges = {}, False, False
    with contextlib.suppress(Exception):  # PEFT cannot load some of what it saves
        wanted, merges = answer_of_peft(adapter, base)
        answers[EXACT], loads = wanted, True
    if not loads or error(wanted, trained) > ROUNDED:  # nor are all answers then those of the model that it trained
        answers[2 * EXACT if case.dtype is torch.float32 else ROUNDED] = trained
    relaid(case, adapter, base)
    with patch.object(
        PreTrainedModel, "_load_pretrained_model", wraps=PreTrainedModel._load_pretrained_model
    ) as loading:
        try:
            model, _ = ours(adapter, base)
        except KTError as refusal:
            assert not loading.called, f"{case}: refused after weights were read: {refusal}"
            known = any(re.search(reason, str(refusal)) for reason in REFUSED)
            assert known or not loads, f"{case}: no reason to refuse: {refusal}"
            event("refused")
            return
    found = logits(model)
    assert any(error(found, answer) < bound for bound, answer in answers.items()), case
    switch_adapter(model, None)
    assert torch.equal(logits(model), plain), case
    try:
        merge_adapter(base, adapter, directory / "merged")
    except KTError as refusal:
        assert not merges, f"{case}: PEFT merges it: {refusal}"
        return
    assert error(logits(stock(directory / "merged")), found) < EXACT, case


@settings(SETTINGS, max_examples=20)
@example(5050)  # patterns
@example(5080)  # and of parameters
@given(SEEDS)
def test_answer_of_peft_or_one_error(bases, seed):
    with tempfile.TemporaryDirectory() as directory:
        check(drawn(seed), bases, Path(directory))


@pytest.mark.nightly
@settings(SETTINGS, max_examples=500)
@given(SEEDS)
def test_hundreds(bases, seed):
    with tempfile.TemporaryDirectory() as directory:
        check(drawn(seed), bases, Path(directory))
