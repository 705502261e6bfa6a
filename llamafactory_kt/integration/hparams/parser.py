"""``llamafactory.hparams.parser``: what is checked when a configuration for inference asks for use_kt."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import ModuleType
from typing import Any

from ...ground.errors import KTConfigError
from ...ground.paging import share_heaps
from ...ground.streams import take_any_text
from ...settings.check import check_for_inference
from ...settings.sglang_keys import serves
from ...settings.upstream_keys import KEYS, gather, gather_words
from .. import bootstrap
from ..excepthook import end_in_one_paragraph
from ..patching import asks_for, check_stock, expect, replace, require_hooks
from .generating import check_numbers
from .option_lists import accept_json, settle_conflicts
from .template import check_keys, check_name, check_text


def patch(module: ModuleType) -> None:
    """Replace the dependency check for inference; training keeps LLaMA-Factory's own.

    ``get_infer_args`` is guarded first, so that ``use_kt: true`` reports why another hook failed, even one of these.
    """
    if callable(getattr(module, "get_infer_args", None)):
        _guard(module)
    settle_conflicts(module)
    check_stock()
    stock_check = expect(module, "_check_extra_dependencies")
    expect(module, "get_infer_args")
    expect(module, "read_args")
    if (runtime := expect(module, "_KTransformersRuntimeArguments")) is not None:
        accept_json(module, runtime)

    def _check_extra_dependencies(model_args: Any, finetuning_args: Any, training_args: Any = None) -> None:
        if not model_args.use_kt or training_args is not None:
            stock_check(model_args, finetuning_args, training_args)
            return
        require_hooks(*(["llamafactory.chat.sglang_engine"] if serves(model_args) else []))
        take_kt_config(model_args)
        check_for_inference(model_args)
        # The stock check requires forks of transformers and accelerate, and a distribution named sglang.
        backend, model_args.use_kt, model_args.infer_backend = model_args.infer_backend, False, "huggingface"
        try:
            stock_check(model_args, finetuning_args, training_args)
        finally:
            model_args.use_kt, model_args.infer_backend = True, backend
        model_args.kt_inference = True

    replace(module, _check_extra_dependencies)


def take_kt_config(model_args: Any) -> None:
    """Move ``kt_config`` from where LLaMA-Factory 0.9.6 puts it to where our checks look for it."""
    if model_args.kt_config is None:
        model_args.kt_config = getattr(model_args, "_kt_inference_config", None)
    model_args._kt_inference_config = None


def without_mistakes(values: Mapping[str, Any]) -> tuple[dict[str, Any], list[KTConfigError]]:
    """A configuration for a chat without what :func:`check_text`, :func:`check_keys`, :func:`check_name` and :func:`check_numbers` refuse;
    and what they say. Each is what a chat would end with if it were alone."""
    from llamafactory.hparams import parser

    known, left, problems = _known(parser), dict(values), []
    while True:
        try:
            check_text(left)
            break
        except KTConfigError as error:
            problems.append(error)
            key = str(error).partition(" ")[0]
            left[key] = ",".join(map(str, left[key])) if isinstance(left[key], list) else None
    try:
        check_keys(gather(left), known)
    except KTConfigError as error:
        problems.append(error)
        left = {key: value for key, value in left.items() if key in known or key in KEYS}
    try:
        check_name(left.get("template"))
    except KTConfigError as error:
        problems.append(error)
        left["template"] = None
    sampling = {field.name for field in dataclasses.fields(parser.GeneratingArguments)}
    try:
        check_numbers(parser.GeneratingArguments(**{key: left[key] for key in sampling & left.keys()}))
    except KTConfigError as error:
        problems.append(error)
        left = {key: value for key, value in left.items() if key not in sampling}
    return left, problems


def _known(module: Any) -> set[str]:
    """The keys of a configuration for inference."""
    return {field.name for kind in module._INFER_ARGS for field in dataclasses.fields(kind)}


def _guard(module: ModuleType) -> None:
    stock = module.get_infer_args

    def get_infer_args(*args: Any, **kwargs: Any) -> Any:
        given = args[0] if args else kwargs.get("args")
        if asks_for("use_kt", given):
            if given is None:  # the command line, not a Python program
                end_in_one_paragraph(debug=asks_for("kt_debug"))
                take_any_text()
                share_heaps()
            if bootstrap.failures:
                raise next(iter(bootstrap.failures.values()))
            values = module.read_args(given)
            if isinstance(values, dict):
                values = gather(values)
                check_text(values)
                check_keys(values, _known(module))
            else:
                values = gather_words(values)
            found = stock(values)
            if getattr(found[0], "kt_inference", False):
                check_name(found[1].template)
                check_numbers(found[-1])
            return found
        return stock(*args, **kwargs)

    replace(module, get_infer_args)
