"""``llamafactory.model.loader``: four functions that load_model and load_tokenizer look up when they are called.

``init_adapter`` is hooked here and not ``adapter._setup_lora_tuning``, so every finetuning_type gets the same load table. In
training, or without use_kt, each hook calls the stock function. The log goes to the handlers of LLaMA-Factory's logger.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import logging
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from ...ground.errors import printable
from ..auto_classes import answer_by_name
from ..chat_config import experts_config, with_kt
from ..hparams.template import check_tokens
from ..patching import expect, replace

logger = logging.getLogger("llamafactory_kt")


def patch(module: ModuleType) -> None:
    """Hook the four functions; all or none."""
    stock_kwargs = expect(module, "_get_init_kwargs")
    stock_load = expect(module, "load_config")
    stock_patch = expect(module, "patch_config")
    stock_init = expect(module, "init_adapter")

    def _get_init_kwargs(model_args: Any) -> dict[str, Any]:
        init_kwargs: dict[str, Any] = stock_kwargs(model_args)
        if with_kt(model_args):
            from ...checkpoint.formats import check_file

            _share_log()
            check_file(model_args.model_name_or_path)
            _check_readable(model_args.model_name_or_path)
            _prefer_native(model_args, init_kwargs)
        return init_kwargs

    def load_config(model_args: Any) -> Any:
        if not with_kt(model_args):
            return stock_load(model_args)
        from transformers import AutoConfig

        from ...checkpoint.configuration import check_configuration, reading_configuration
        from ...checkpoint.opening import thinker

        name = model_args.model_name_or_path
        with reading_configuration(name):
            if not getattr(model_args, "kt_native", False):
                config = stock_load(model_args)
            else:
                keys = {**_get_init_kwargs(model_args), "trust_remote_code": False}
                config = AutoConfig.from_pretrained(name, **keys)
                # With an auto_map, LLaMA-Factory would register transformers' own classes as remote code.
                vars(config).pop("auto_map", None)
        check_configuration(name, config)
        return thinker(config)

    def patch_config(
        config: Any, tokenizer: Any, model_args: Any, init_kwargs: dict[str, Any], is_trainable: bool
    ) -> None:
        if not with_kt(model_args, is_trainable):
            stock_patch(config, tokenizer, model_args, init_kwargs, is_trainable)
            return
        from ...checkpoint.formats import format_of, quantization

        format_of(config)  # refuses what cannot be read
        check_tokens(tokenizer, config, resizes=bool(model_args.resize_vocab))
        with _unquantized(config):
            stock_patch(config, tokenizer, model_args, init_kwargs, is_trainable)
        _prepare(model_args, init_kwargs, quantization(config))

    def init_adapter(config: Any, model: Any, model_args: Any, finetuning_args: Any, is_trainable: bool) -> Any:
        if with_kt(model_args, is_trainable):
            return _apply(model, model_args)
        return stock_init(config, model, model_args, finetuning_args, is_trainable)

    replace(module, _get_init_kwargs, load_config, patch_config, init_adapter)


@contextlib.contextmanager
def for_text_alone() -> Iterator[None]:
    """Let stock models load that LLaMA-Factory refuses with torch 2.9: it does so for a Conv3d, which is slow, and text does not use it.

    Raises:
        KTHookError: The loader is not one of a known LLaMA-Factory.
    """
    loader: Any = import_module("llamafactory.model.loader")
    stock = expect(loader, "is_torch_version_greater_than")  # which decides nothing else there
    loader.is_torch_version_greater_than = lambda content: False
    try:
        yield
    finally:
        loader.is_torch_version_greater_than = stock


@contextlib.contextmanager
def in_dtype(dtype: Any) -> Iterator[None]:
    """Load models in another dtype than their checkpoint's. LLaMA-Factory asks transformers for the configuration's, whatever
    ``infer_dtype`` says.

    Raises:
        KTHookError: The loader is not one of a known LLaMA-Factory.
    """
    loader: Any = import_module("llamafactory.model.loader")
    before = expect(loader, "load_config")

    def load_config(model_args: Any) -> Any:
        config = before(model_args)
        for part in (config, *(getattr(config, name, None) for name in config.sub_configs)):
            if part is not None:
                part.dtype = dtype
        return config

    loader.load_config = load_config
    try:
        yield
    finally:
        loader.load_config = before


@contextlib.contextmanager
def _unquantized(config: Any) -> Iterator[None]:
    """Let LLaMA-Factory see a configuration without ``quantization_config``: it would ask for the format's own quantizer, and for
    libraries that compute with it, while the weights are decoded here."""
    stored = vars(config).pop("quantization_config", None)
    try:
        yield
    finally:
        if stored:  # transformers refuses an empty one
            config.quantization_config = stored


def _share_log() -> None:
    """Send our log to LLaMA-Factory's handlers, in its format. Paths and names in it cannot move the terminal's cursor."""
    stock = logging.getLogger("llamafactory")
    logger.handlers = [copy.copy(handler) for handler in stock.handlers]  # which share its streams and locks
    for handler in logger.handlers:
        handler.filters = [*handler.filters, _escape]
    logger.setLevel(stock.level)
    logger.propagate = False
    for name in ("configuration_utils", "modeling_utils"):
        logging.getLogger(f"transformers.{name}").addFilter(_concerns_users)


def _concerns_users(record: logging.LogRecord) -> bool:
    """Not what LLaMA-Factory's own code does, whatever a user asks for."""
    return "`torch_dtype` is deprecated" not in str(record.msg)


def _escape(record: logging.LogRecord) -> bool:
    record.msg, record.args = "\n".join(map(printable, record.getMessage().split("\n"))), ()
    return True


def _check_readable(name: str) -> None:
    """Refuse a local model with a configuration that transformers refuses. It is read with the tokenizer first, and LLaMA-Factory's error
    then says that the tokenizer failed to load."""
    from transformers import CONFIG_MAPPING, AutoConfig, PretrainedConfig

    from ...checkpoint.configuration import reading_configuration

    if not Path(name).is_dir():
        return
    with reading_configuration(name):
        raw, _ = PretrainedConfig.get_config_dict(name)
        if raw.get("model_type") in CONFIG_MAPPING:
            AutoConfig.from_pretrained(name, trust_remote_code=False)


def _prefer_native(model_args: Any, init_kwargs: dict[str, Any]) -> None:
    """Load tokenizer, configuration and model with transformers' own classes if it has them.

    Only those follow the experts contract; the code in older checkpoints was written for transformers 4. A tokenizer that exists
    only as remote code keeps ``trust_remote_code``.
    """
    from transformers import CONFIG_MAPPING, PretrainedConfig
    from transformers.models.auto.tokenization_auto import get_tokenizer_config

    if not init_kwargs["trust_remote_code"]:
        return
    keys = {name: init_kwargs[name] for name in ("cache_dir", "revision", "token")}
    if not hasattr(model_args, "kt_native"):
        try:
            raw, _ = PretrainedConfig.get_config_dict(model_args.model_name_or_path, **keys)
        except OSError:
            return  # LLaMA-Factory's own load reports what is missing
        model_args.kt_native = raw.get("model_type") in CONFIG_MAPPING
        if model_args.kt_native and "auto_map" in raw:
            logger.info("Using transformers' own %s classes instead of the checkpoint's code.", raw["model_type"])
    if model_args.kt_native and "auto_map" not in get_tokenizer_config(model_args.model_name_or_path, **keys):
        init_kwargs["trust_remote_code"] = False


def _prepare(model_args: Any, init_kwargs: dict[str, Any], checkpoint: dict[str, Any]) -> None:
    """Add KT to the arguments of ``from_pretrained``.

    Args:
        checkpoint: its ``quantization_config``, which transformers passes on for the formats that it knows.
    """
    import torch

    logger.info("Loading model with KTransformers MoE backend")
    init_kwargs["quantization_config"] = dataclasses.replace(experts_config(model_args), checkpoint=checkpoint or None)
    answer_by_name()
    if getattr(model_args, "kt_native", False):
        init_kwargs["trust_remote_code"] = False  # even if the tokenizer needed it
    # Everything but the experts goes to the GPU, or is spread over several; without a GPU, all of it stays on the CPU.
    count = torch.cuda.device_count()
    init_kwargs["device_map"] = "auto" if count > 1 else {"": torch.device("cuda", 0) if count else torch.device("cpu")}


def _apply(model: Any, model_args: Any) -> Any:
    """Apply the adapters, optimize, and log the load table; returns the model, wrapped by PEFT if it applies a part."""
    from ...apply import apply_adapter
    from ...decoding.generate import keep_prompts
    from ...decoding.optimize import optimize_for_inference
    from ...decoding.process import configure_process
    from ...load_report import debug_structure
    from ...model.state import kt_state
    from ...settings.keys import expanded

    for line in configure_process(model):
        if model_args.kt_debug:
            logger.info("kt_debug: %s", line)
    state = kt_state(model)
    if state.requested.adapters:
        model, _ = apply_adapter(model, state.requested, model_args.kt_lora_scope)
        logger.info("Loaded adapter(s): %s", ",".join(model_args.adapter_name_or_path or [model_args.kt_moe_lora_path]))
    optimize_for_inference(model)
    state.show_stats, state.lora_scope = model_args.kt_stats, model_args.kt_lora_scope
    directory = expanded(model_args.kt_prompt_cache_dir)
    keep_prompts(state, model_args.kt_prompt_cache, model_args.kt_prompt_cache_gib, directory)
    log_load_table(model)
    if model_args.kt_debug:
        logger.info("%s", "\n" + debug_structure(model))
    return model


def log_load_table(model: Any) -> None:
    """Log a model's load table."""
    from ...load_report import load_rows, load_table

    logger.info("%s", "\n" + load_table(load_rows(model)))
