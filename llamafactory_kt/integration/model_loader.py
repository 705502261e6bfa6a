"""``llamafactory.model.loader``: four functions that load_model and load_tokenizer look up when they are called.

``init_adapter`` is hooked here and not ``adapter._setup_lora_tuning``, so that every finetuning_type ends in the same
load table. With training, or without use_kt, each hook is the stock function.
"""

from __future__ import annotations

import functools
import logging
from types import ModuleType
from typing import Any

from .auto_classes import answer_by_name
from .chat_config import experts_config
from .patching import expect, is_patched, replace

logger = logging.getLogger("llamafactory_kt")


def patch(module: ModuleType) -> None:
    """Hook the four functions; all or none."""
    if is_patched(module):
        return
    kwargs_stock = expect(module, "_get_init_kwargs", ("model_args",))
    load = expect(module, "load_config", ("model_args",))
    patch_stock = expect(module, "patch_config", ("config", "tokenizer", "model_args", "init_kwargs", "is_trainable"))
    init = expect(module, "init_adapter", ("config", "model", "model_args", "finetuning_args", "is_trainable"))

    @functools.wraps(kwargs_stock)
    def get_init_kwargs(model_args: Any) -> dict[str, Any]:
        init_kwargs: dict[str, Any] = kwargs_stock(model_args)
        if _with_kt(model_args, is_trainable=False):
            _share_log()
            _prefer_native(model_args, init_kwargs)
        return init_kwargs

    @functools.wraps(load)
    def load_config(model_args: Any) -> Any:
        if not (_with_kt(model_args, is_trainable=False) and getattr(model_args, "kt_native", False)):
            return load(model_args)
        from transformers import AutoConfig

        keys = {**get_init_kwargs(model_args), "trust_remote_code": False}
        config = AutoConfig.from_pretrained(model_args.model_name_or_path, **keys)
        # LLaMA-Factory registers classes that have an auto_map as remote code, which transformers' own are not.
        vars(config).pop("auto_map", None)
        return config

    @functools.wraps(patch_stock)
    def patch_config(
        config: Any, tokenizer: Any, model_args: Any, init_kwargs: dict[str, Any], is_trainable: bool
    ) -> None:
        if _with_kt(model_args, is_trainable):
            from ..checkpoint.fp8 import block_size

            block_size(
                getattr(config, "quantization_config", None)
            )  # before LLaMA-Factory asks for the library of another format
        patch_stock(config, tokenizer, model_args, init_kwargs, is_trainable)
        if _with_kt(model_args, is_trainable):
            _prepare(model_args, init_kwargs)

    @functools.wraps(init)
    def init_adapter(config: Any, model: Any, model_args: Any, finetuning_args: Any, is_trainable: bool) -> Any:
        if not _with_kt(model_args, is_trainable):
            return init(config, model, model_args, finetuning_args, is_trainable)
        return _apply(model, model_args)

    replace(
        module,
        _get_init_kwargs=get_init_kwargs,
        load_config=load_config,
        patch_config=patch_config,
        init_adapter=init_adapter,
    )


def _with_kt(model_args: Any, is_trainable: bool) -> bool:
    # kt_inference is set by the parser's hook: a training run loads its reference models untrainable, but not for us.
    return bool(model_args.use_kt) and not is_trainable and getattr(model_args, "kt_inference", False)


def _share_log() -> None:
    """Send our log where LLaMA-Factory's goes, in its format."""
    stock = logging.getLogger("llamafactory")
    logger.handlers = list(stock.handlers)
    logger.setLevel(stock.level)
    logger.propagate = False


def _prefer_native(model_args: Any, init_kwargs: dict[str, Any]) -> None:
    """Load tokenizer, configuration and model with transformers' own classes where it has them.

    The experts contract lives there, and the code shipped with older checkpoints was written for transformers 4. A
    tokenizer that exists only as remote code keeps ``trust_remote_code``.
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
            return  # LLaMA-Factory's own load will say what is missing
        model_args.kt_native = raw.get("model_type") in CONFIG_MAPPING
        if model_args.kt_native and "auto_map" in raw:
            logger.info("Using transformers' own %s classes instead of the checkpoint's code.", raw["model_type"])
    if model_args.kt_native and "auto_map" not in get_tokenizer_config(model_args.model_name_or_path, **keys):
        init_kwargs["trust_remote_code"] = False


def _prepare(model_args: Any, init_kwargs: dict[str, Any]) -> None:
    import torch

    logger.info("Loading model with KTransformers MoE backend")
    init_kwargs["quantization_config"] = experts_config(model_args)
    answer_by_name()
    init_kwargs.pop("ignore_mismatched_sizes", None)  # which LLaMA-Factory sets for FP8 checkpoints
    if getattr(model_args, "kt_native", False):
        init_kwargs["trust_remote_code"] = False  # also where the tokenizer needed it
    # Without a GPU everything is on the CPU; with one, all but the experts goes there; several share it as usual.
    count = torch.cuda.device_count()
    init_kwargs["device_map"] = "auto" if count > 1 else {"": torch.device("cuda", 0) if count else torch.device("cpu")}


def _apply(model: Any, model_args: Any) -> Any:
    from ..apply import apply_adapter
    from ..decoding.optimize import optimize_for_inference
    from ..decoding.process import configure_process
    from ..load_report import debug_structure
    from ..model.state import kt_state

    for line in configure_process(model):
        if model_args.kt_debug:
            logger.info("kt_debug: %s", line)
    state = kt_state(model)
    if state.requested.adapters:
        model, _ = apply_adapter(model, state.requested, model_args.kt_lora_scope)
        logger.info("Loaded adapter(s): %s", ",".join(model_args.adapter_name_or_path or [model_args.kt_moe_lora_path]))
    optimize_for_inference(model)
    state.show_stats = model_args.kt_stats
    log_load_table(model)
    if model_args.kt_debug:
        logger.info("%s", "\n" + debug_structure(model))
    return model


def log_load_table(model: Any) -> None:
    """Say what a model has now."""
    from ..load_report import load_rows, load_table

    logger.info("%s", "\n" + load_table(load_rows(model)))
