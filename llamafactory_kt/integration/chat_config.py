"""A YAML for ``llamafactory-cli chat``, read as LLaMA-Factory reads it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..adapters import AdapterSet, open_adapters
from ..ground.errors import KTConfigError, KTError, KTPathError, one_line
from ..settings.keys import adapter_directories, choice_directories, expanded, threadpool_count
from ..settings.upstream_keys import dictionary
from .patching import require_hooks

if TYPE_CHECKING:
    from ..model import KTExpertsConfig


def read_yaml(path: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The configuration's keys, read as LLaMA-Factory's ``read_args`` does.

    Args:
        path: the YAML.
        overrides: ``key=value``, as on LLaMA-Factory's command line.

    Raises:
        KTPathError: The file does not exist.
        KTConfigError: It is not YAML or not a mapping of keys, or an override is not ``key=value``.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    path = Path(path).expanduser()
    if not path.is_file():
        raise KTPathError(f"{path}: the configuration does not exist or is not a file.")
    try:
        loaded = OmegaConf.load(path)
        if not OmegaConf.is_dict(loaded):
            raise KTConfigError(f"{path} must be a mapping of keys to values.")
        return overridden(loaded, overrides)
    except (YAMLError, OmegaConfBaseException, UnicodeDecodeError, OSError) as error:
        raise KTConfigError(f"{path} is not valid YAML: {one_line(error)}") from error


def overridden(values: Any, words: Sequence[str]) -> dict[str, Any]:
    """Keys with ``key=value`` words in their place, as on LLaMA-Factory's command line: values are YAML, dots name nested keys.

    Raises:
        KTConfigError: A word has no ``=``.

    >>> overridden({"kt_num_threads": 2, "kt_config": {"kt_tp_enabled": True}}, ["kt_num_threads=4", "kt_config.kt_backend=AMXINT4"])
    {'kt_num_threads': 4, 'kt_config': {'kt_tp_enabled': True, 'kt_backend': 'AMXINT4'}}
    """
    from omegaconf import OmegaConf

    if wrong := [word for word in words if "=" not in word]:
        raise KTConfigError(f"expected key=value, found {wrong[0]!r}.")
    merged: Any = OmegaConf.to_container(OmegaConf.merge(values, OmegaConf.from_cli(list(words))), resolve=True)
    return {str(key): value for key, value in merged.items()}


def kt_keys(values: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration's ``kt_*`` keys, those in ``kt_config`` among them.

    >>> kt_keys({"template": "qwen3", "kt_load": "mmap", "kt_config": {"kt_backend": "INT4"}})
    {'kt_load': 'mmap', 'kt_backend': 'INT4'}
    """
    ours = {key: value for key, value in values.items() if key.startswith("kt_") and key != "kt_config"}
    return ours | dictionary(values.get("kt_config"))


def parse(values: dict[str, Any]) -> Any:
    """LLaMA-Factory's model arguments, after its and our checks for a chat.

    Raises:
        KTError: One of our checks failed.
        ValueError: One of LLaMA-Factory's failed.
    """
    return parse_chat(values)[0]


def parse_chat(values: dict[str, Any]) -> tuple[Any, Any]:
    """LLaMA-Factory's model arguments and data arguments, which name the template; else as :func:`parse`."""
    require_hooks()
    from llamafactory.hparams import get_infer_args

    model_args, data_args, *_ = get_infer_args(dict(values))
    return model_args, data_args


def parse_from(path: str | Path, values: dict[str, Any]) -> Any:
    """:func:`parse` for the values of a file, which is named in LLaMA-Factory's own errors.

    Raises:
        KTError: One of our checks failed.
        KTConfigError: LLaMA-Factory refuses the values.
    """
    try:
        return parse(values)
    except KTError:
        raise
    except Exception as error:  # unknown keys, wrong types, packages that a key needs
        raise KTConfigError(f"{path}: {one_line(error)}") from error


def experts_config(model_args: Any) -> KTExpertsConfig:
    """The ``quantization_config`` of the load.

    Raises:
        KTPathError: An adapter does not exist.
    """
    from ..model import KTExpertsConfig

    weights, moe_lora = expanded(model_args.kt_weight_path), expanded(model_args.kt_moe_lora_path)
    return KTExpertsConfig(
        backend=model_args.kt_backend,
        num_threads=model_args.kt_num_threads,
        threadpool_count=threadpool_count(model_args),
        weight_path=str(weights) if weights else None,
        idle_workers=model_args.kt_idle_workers,
        recalibrate=model_args.kt_recalibrate,
        load=model_args.kt_load,
        dense=model_args.kt_dense,
        cache=model_args.kt_cache,
        gpu_experts=model_args.kt_gpu_experts or 0,
        gpu_experts_path=model_args.kt_gpu_experts_path,
        max_chunk=model_args.kt_max_chunk,
        adapter=[str(path) for path in adapter_directories(model_args)],
        choices={name: [str(path) for path in paths] for name, paths in choice_directories(model_args).items()},
        moe_lora=str(moe_lora) if moe_lora else None,
        merge_adapter=model_args.kt_merge_adapter,
        resize_vocab=bool(model_args.resize_vocab),
        router_stats=model_args.kt_router_stats,
        debug=model_args.kt_debug,
        debug_dir=model_args.kt_debug_dir,
    )


def open_configured(model_args: Any) -> AdapterSet:
    """The configuration's adapters, opened by their headers.

    Raises:
        KTPathError: An adapter does not exist.
        KTAdapterError: An adapter cannot be read.
    """
    return open_adapters(adapter_directories(model_args), expanded(model_args.kt_moe_lora_path))


def open_choice(model_args: Any, name: str) -> AdapterSet:
    """The adapters that a name in ``kt_adapters`` stands for, opened by their headers.

    Raises:
        KTPathError: An adapter does not exist.
        KTAdapterError: An adapter cannot be read.
    """
    return open_adapters(choice_directories(model_args)[name])


def with_kt(model_args: Any, is_trainable: bool = False) -> bool:
    """Whether a model that LLaMA-Factory loads gets KT experts."""
    # The parser's hook sets kt_inference; without it, a training run is loading one of its reference models.
    return bool(model_args.use_kt) and not is_trainable and getattr(model_args, "kt_inference", False)
