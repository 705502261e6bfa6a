"""A YAML for ``llamafactory-cli chat`` as LLaMA-Factory reads it, for the commands that look at one."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..adapters import AdapterSet, open_adapters
from ..ground.errors import KTConfigError, KTError, KTPathError, one_line
from ..settings.keys import adapter_directories, threadpool_count
from .patching import require_hooks

if TYPE_CHECKING:
    from ..model import KTExpertsConfig


def read_yaml(path: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The configuration's keys, read as LLaMA-Factory's ``read_args`` does.

    Args:
        overrides: ``key=value``, as on LLaMA-Factory's command line.

    Raises:
        KTPathError: There is no such file.
        KTConfigError: It is not YAML, or not a mapping of keys; a word is not ``key=value``.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError

    if wrong := [word for word in overrides if "=" not in word]:
        raise KTConfigError(f"expected key=value after the configuration, found {wrong[0]!r}.")
    path = Path(path).expanduser()
    if not path.is_file():
        raise KTPathError(f"{path}: the configuration does not exist or is not a file.")
    try:
        loaded = OmegaConf.load(path)
        if not OmegaConf.is_dict(loaded):
            raise KTConfigError(f"{path} must be a mapping of keys to values.")
        merged = OmegaConf.merge(loaded, OmegaConf.from_cli(list(overrides)))
        values: Any = OmegaConf.to_container(merged, resolve=True)
    except (YAMLError, OmegaConfBaseException, UnicodeDecodeError, OSError) as error:
        raise KTConfigError(f"{path} is not valid YAML: {one_line(error)}") from error
    return {str(key): value for key, value in values.items()}


def parse(values: dict[str, Any]) -> Any:
    """LLaMA-Factory's model arguments, after all of its and our checks for a chat.

    Raises:
        KTError: Of one of our own checks.
        ValueError: Of LLaMA-Factory's.
    """
    require_hooks()
    from llamafactory.hparams import get_infer_args

    return get_infer_args(dict(values))[0]


def parse_from(path: str | Path, values: dict[str, Any]) -> Any:
    """:func:`parse` for values of a file, which LLaMA-Factory's own errors then name.

    Raises:
        KTError: Of one of our own checks.
        KTConfigError: LLaMA-Factory refuses the values.
    """
    try:
        return parse(values)
    except KTError:
        raise
    except Exception as error:  # unknown keys, wrong types, packages that a key needs
        raise KTConfigError(f"{path}: {one_line(error)}") from error


def moe_lora_file(model_args: Any) -> str | None:
    """``kt_moe_lora_path`` with the home directory in place of ``~``."""
    return str(Path(model_args.kt_moe_lora_path).expanduser()) if model_args.kt_moe_lora_path else None


def experts_config(model_args: Any) -> KTExpertsConfig:
    """What a load gives to transformers.

    Raises:
        KTPathError: An adapter is not there.
    """
    from ..model import KTExpertsConfig

    return KTExpertsConfig(
        backend=model_args.kt_backend,
        num_threads=model_args.kt_num_threads,
        threadpool_count=threadpool_count(model_args),
        weight_path=str(Path(model_args.kt_weight_path).expanduser()) if model_args.kt_weight_path else None,
        idle_workers=model_args.kt_idle_workers,
        recalibrate=model_args.kt_recalibrate,
        max_chunk=model_args.kt_max_chunk,
        adapter=[str(path) for path in adapter_directories(model_args)],
        moe_lora=moe_lora_file(model_args),
        merge_adapter=model_args.kt_merge_adapter,
        router_stats=model_args.kt_router_stats,
        debug=model_args.kt_debug,
        debug_dir=model_args.kt_debug_dir,
    )


def open_configured(model_args: Any) -> AdapterSet:
    """The configuration's adapters, opened by their headers.

    Raises:
        KTPathError: One is not there.
        KTAdapterError: One cannot be read.
    """
    return open_adapters(adapter_directories(model_args), moe_lora_file(model_args))
