"""A chat's YAML: does it parse, do the files exist and fit together, and what would be loaded where."""

from __future__ import annotations

import logging
import re
from collections.abc import Generator, Mapping, Sequence
from logging.handlers import BufferingHandler
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from ...ground.errors import KTConfigError, KTError, describe, name_some
from ...ground.machine import gib
from .adapters import RESIZE, adapters_of, choices_of
from .finding import Finding, Findings, error, ok, see, warning
from .load import memory_of

if TYPE_CHECKING:
    from ...checkpoint.opening import MoEModel


_OF_FILES = (
    "use_kt",
    "model_name_or_path",
    "adapter_name_or_path",
    "adapter_folder",
    "template",
    "trust_remote_code",
    "cache_dir",
    *RESIZE,
)
"""keys that say which files a chat reads; with these alone, they are looked at where others are wrong"""


def configuration(config: Path, overrides: Sequence[str] = ()) -> Findings:
    """Check everything that a load checks before it reads weights, also after a mistake, and estimate the memory of a load."""
    from ...integration.chat_config import read_yaml

    logged = BufferingHandler(capacity=1000)
    logged.setLevel(logging.WARNING)
    logger = logging.getLogger("llamafactory_kt")
    logger.addHandler(logged)
    try:
        values = read_yaml(config, overrides)
        found = yield from _parsed(config, values)
    except KTError as problem:
        there = config.is_file()
        advice = (
            "Correct the file." if there else "Give the YAML that llamafactory-cli chat takes, and keys as key=value."
        )
        yield error("configuration", describe(problem), advice)
        return
    finally:
        logger.removeHandler(logged)
    for message in dict.fromkeys(record.getMessage() for record in logged.buffer):
        yield warning("configuration", message, "Remove the key for chats.")
    if found is None:
        if (named := _named(values)).adapter_name_or_path or named.kt_moe_lora_path:
            yield from adapters_of(named, None)
        return
    args, data_args, whole = found
    if not args.use_kt:
        text = f"{config} does not ask for use_kt"
        yield warning(
            "configuration",
            text,
            "use_kt: true computes the routed experts on the CPU; without it, the chat is LLaMA-Factory's own.",
        )
        return
    if whole:
        yield ok("configuration", f"{config} parses; kt_backend: {args.kt_backend}")
    yield from _model(args, data_args, whole, values)


def _parsed(config: Path, values: dict[str, Any]) -> Generator[Finding, None, tuple[Any, Any, bool] | None]:
    """LLaMA-Factory's arguments for model and data, and whether all keys are in them. What is wrong is left out, so that the rest is
    looked at, too; None if nothing remains."""
    from ...integration.chat_config import parse_chat
    from ...integration.hparams.parser import without_mistakes

    advice = f"Correct the file.{see('chat-guide.md')}"
    left, problems = without_mistakes(values)
    for problem in problems:
        yield error("configuration", f"{config}: {describe(problem)}", advice)
    try:
        return *parse_chat(left), not problems
    except Exception as problem:
        each = re.findall("^- (.*)", str(problem), re.M) if isinstance(problem, KTConfigError) else []
        for text in each or [describe(problem)]:
            yield error("configuration", f"{config}: {text}", advice)
    files = {key: left[key] for key in _OF_FILES if key in left}
    there = _named(left).adapter_name_or_path
    files["adapter_name_or_path"] = ",".join(there) or None
    try:
        return *parse_chat(files), False
    except Exception:  # most likely the same: no model
        return None


def _named(values: Mapping[str, Any]) -> Any:
    """A configuration's adapters that exist, as :func:`~...integration.chat_config.open_configured` takes them."""
    given = values.get("adapter_name_or_path")
    names = given if isinstance(given, list) else str(given or "").split(",")
    there = [str(name).strip() for name in names if name and Path(str(name).strip()).expanduser().exists()]
    moe_lora = values.get("kt_moe_lora_path")
    there_too = moe_lora if isinstance(moe_lora, str) and Path(moe_lora).expanduser().is_file() else None
    hub = dict.fromkeys(("model_revision", "cache_dir", "hf_hub_token"))
    return SimpleNamespace(
        adapter_name_or_path=there, kt_moe_lora_path=there_too, adapter_folder=values.get("adapter_folder"), **hub
    )


def _model(args: Any, data_args: Any, whole: bool, values: Mapping[str, Any]) -> Findings:
    from ...adapters import AdapterSet
    from ...checkpoint.discovery import formulas
    from ...checkpoint.opening import MoEModel, empty_model, weight_files

    name = args.model_name_or_path
    try:
        moe = MoEModel(empty_model(name, quantized=True), weight_files(name))
    except KTError as problem:
        yield error(
            "model",
            describe(problem),
            f"Give a folder with config.json and safetensors files, or a name on a hub that this machine reaches.{see('architectures.md')}",
        )
        yield from adapters_of(args, None)
        yield from choices_of(args, None)
        return
    first = moe.experts[0]
    yield ok(
        "model",
        f"{type(moe.model).__name__}: {len(moe.experts)} layers of {first.shape.num_experts} routed experts "
        f"({first.shape.hidden_size} x {first.shape.intermediate_size}), {first.num_experts_per_tok} per token, each "
        f"{name_some(list(map(str, formulas(moe.experts))), 2)}",
    )
    if Path(args.model_name_or_path).expanduser().is_dir():
        yield from _template(args, data_args if data_args.template == values.get("template") else None, moe)
    layout = yield from _checkpoint(args, moe)
    lost = values.get("adapter_name_or_path") and not args.adapter_name_or_path  # which has been reported
    adapters = AdapterSet() if lost else (yield from adapters_of(args, moe))
    choices = yield from choices_of(args, moe)
    if whole:  # else it is not known how the experts are to be kept
        yield from memory_of(args, moe, [adapters, *choices], layout)


def _template(args: Any, data_args: Any, moe: MoEModel) -> Findings:
    """Make a prompt as a chat does; where the template is wrong (None), load the tokenizer alone."""
    from ...integration.hparams.template import check_prompt, load_tokenizer

    try:
        tokenizer = load_tokenizer(args)
    except KTError as problem:
        yield error(
            "tokenizer", describe(problem), "A chat needs the tokenizer's files, and no others beside the weights."
        )
        return
    if data_args is None:
        return
    try:
        check_prompt(tokenizer, data_args, moe.model.config, resizes=bool(args.resize_vocab))
    except Exception as problem:  # also of templates that do not go with the tokenizer
        yield error("template", describe(problem), "Set template to the one that the model was made for.")
        return
    yield ok("template", f"{data_args.template or 'of the tokenizer'}; {len(tokenizer)} tokens")


def _checkpoint(args: Any, moe: MoEModel) -> Any:
    """Check the headers; returns the :class:`CheckpointLayout` that a load would find, None if it would find none."""
    directory = Path(args.model_name_or_path).expanduser()
    if not directory.is_dir():
        yield warning(
            "checkpoint", f"{args.model_name_or_path} is a name on the hub; its files were not looked at",
            "Download it first: then its files are checked, and the first start is fast.",
        )  # fmt: skip
        return None
    if not moe.files:
        yield error("checkpoint", f"{directory} holds no safetensors files", "Download or convert the checkpoint.")
        return None
    try:
        layout = moe.layout
    except KTError as problem:
        yield error(
            "checkpoint",
            describe(problem),
            f"Download or copy the checkpoint again, if nothing else is said.{see('messages.md')}",
        )
        return None
    size = sum(file.stat().st_size for file in moe.files)
    yield ok("checkpoint", f"{len(moe.files)} file(s), {gib(size)}, experts in {', '.join(sorted(layout.dtypes()))}")
    return layout
