"""A configuration as the command line of an SGLang server with KT."""

from __future__ import annotations

import json
import shlex
from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from ..engines.ktkernel.sub_pools import divided_among
from ..ground.errors import KTConfigError, KTModelError, KTPathError
from ..ground.machine import usable_cores
from ..settings.keys import expanded, threadpool_count
from ..settings.sglang_keys import serving_method
from .adapter import ServedAdapter, serve_adapter
from .options import Dialect, ServerOptions

MOST_THREADS = 60
"""upper limit of the default for kt_cpuinfer, from SGLang's guides for KT"""

_EXPERT_COUNTS = ("num_local_experts", "num_experts", "n_routed_experts")
"""where sglang-kt looks for the number of experts (kt_ep_wrapper.py, _init_kt_gpu_experts_masks)"""


@dataclass(frozen=True)
class ServerCommand:
    """What to run."""

    python: str
    arguments: list[str]
    """after ``python -m sglang.launch_server``"""
    parsed: Namespace
    """the arguments as the server parses them"""
    adapter: ServedAdapter
    notices: list[str]
    """effects on every request that an operator should know"""

    @property
    def request_notice(self) -> str | None:
        """How requests name the adapter; None if they need not."""
        name = self.adapter.name
        if name is None:
            return None
        how = f'"lora_path": "{name}" to /generate, "model": "NAME:{name}" to /v1/chat/completions'
        if self.adapter.required:
            return f"Every request must name the adapter, or SGLang refuses it: {how}."
        what = "the rest of it" if self.adapter.experts else "it"
        return f"Only requests that name the adapter get {what}: {how}."

    @property
    def words(self) -> list[str]:
        return [self.python, "-m", "sglang.launch_server", *self.arguments]

    def __str__(self) -> str:
        """For a shell; one option per line."""
        lines: list[str] = []
        for word in self.arguments:
            if word.startswith("--") or not lines:
                lines.append(shlex.quote(word))
            else:
                lines[-1] += f" {shlex.quote(word)}"
        return " \\\n    ".join([f"{shlex.quote(self.python)} -m sglang.launch_server", *lines])


def server_command(args: Any, options: ServerOptions, extra: Sequence[str] = ()) -> ServerCommand:
    """Check everything that is known before the server runs, prepare the adapter, and build the command.

    Args:
        args: LLaMA-Factory's ModelArguments with our fields, checked by :func:`~llamafactory_kt.settings.check.check_for_inference`.
        options: the installed server.
        extra: more of the server's own options; they come last, so they win.

    Raises:
        KTConfigError: A key or an option is wrong, or does not go with the model or the adapter.
        KTPathError: The model is not a local directory.
        KTModelError: The server has no such model, or the model has no routed experts.
        KTAdapterError, KTServerError: As in :func:`~llamafactory_kt.serving.adapter.serve_adapter`.
    """
    import torch

    model, config = _check_model(args, options)
    weights = (expanded(args.kt_weight_path) or model).resolve()
    pools = threadpool_count(args)
    threads = args.kt_cpuinfer or args.kt_num_threads or min(usable_cores(), MOST_THREADS)
    if threads < pools:
        raise KTConfigError(
            f"kt_cpuinfer: {threads} threads are fewer than kt_threadpool_count: {pools}; give each pool one."
        )
    if (made_for := divided_among(weights)) not in (None, pools):
        raise KTConfigError(
            f"kt_weight_path: {weights} is divided among {made_for} sub-pool(s), but kt_threadpool_count is {pools} (default: one "
            f"per NUMA node). Set kt_threadpool_count: {made_for}, or llamafactory-kt quantize --threadpool-count {pools}."
        )
    adapter = serve_adapter(args, options, mla=config.get("kv_lora_rank") is not None)
    arguments = [
        "--model-path", str(model),
        "--dtype", str(args.infer_dtype),
        "--context-length", str(args.sglang_maxlen),
        "--mem-fraction-static", str(args.sglang_mem_fraction),
        "--tp-size", str(args.sglang_tp_size if args.sglang_tp_size != -1 else torch.cuda.device_count() or 1),
        "--kt-weight-path", str(weights),
        "--kt-method", serving_method(args).name,
        "--kt-cpuinfer", str(threads),
        "--kt-threadpool-count", str(pools),
    ]  # fmt: skip
    # Without either option, SGLang turns KT off with only a warning, or fails on a None.
    if args.kt_gpu_experts_ratio is not None:
        arguments += ["--kt-gpu-experts-ratio", str(args.kt_gpu_experts_ratio)]
    else:
        arguments += ["--kt-num-gpu-experts", str(args.kt_num_gpu_experts or 0)]
    if args.kt_max_deferred_experts_per_token is not None:
        arguments += ["--kt-max-deferred-experts-per-token", str(args.kt_max_deferred_experts_per_token)]
    if args.trust_remote_code:
        arguments.append("--trust-remote-code")
    arguments += adapter.flags
    if adapter.experts:
        arguments.append("--disable-cuda-graph")
    if adapter.name and options.dialect is not Dialect.EXPERT_LORA:
        arguments.append("--disable-radix-cache")  # as LLaMA-Factory does; newer servers cache per adapter
    arguments += [*_from_config(args.sglang_config), *extra]
    parsed = options.parse(arguments)
    if adapter.experts:
        _check_expert_lora(options, parsed, adapter)
    return ServerCommand(options.python, arguments, parsed, adapter, _notices(parsed, adapter))


def _check_model(args: Any, options: ServerOptions) -> tuple[Path, dict[str, Any]]:
    """The checkpoint's directory and its text model's configuration, after checking that the server can serve it with KT."""
    model = Path(args.model_name_or_path).expanduser()
    if not model.is_dir():
        raise KTPathError(
            f"model_name_or_path: {args.model_name_or_path} is not a local directory, and SGLang with KT reads the experts from "
            f"one. Run hf download {args.model_name_or_path} --local-dir DIR and set model_name_or_path: DIR."
        )
    try:
        config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise KTModelError(f"{model / 'config.json'} cannot be read: {error}.") from error
    names = config.get("architectures") or []
    if options.architectures and names and not set(names) & set(options.architectures):
        raise KTModelError(f"{model} is a {', '.join(names)}, which {options.version} does not have.")
    config |= config.get("text_config") or {}
    if not any(config.get(name) for name in _EXPERT_COUNTS):
        raise KTModelError(
            f"{model / 'config.json'} has none of {', '.join(_EXPERT_COUNTS)}: SGLang with KT finds no routed experts. "
            "Remove use_kt."
        )
    return model.resolve(), config


def _from_config(config: Any) -> list[str]:
    """LLaMA-Factory's ``sglang_config``, a dictionary of the server's options, as command-line words."""
    if config is None:
        return []
    if not isinstance(config, Mapping):
        raise KTConfigError(f"sglang_config must be a dictionary of SGLang's options, found {config!r}.")
    words: list[str] = []
    for key, value in config.items():
        flag = f"--{str(key).replace('_', '-')}"
        if value is None or value is False:
            continue
        values = value if isinstance(value, list) else [] if value is True else [value]
        words += [flag, *(json.dumps(item) if isinstance(item, dict) else str(item) for item in values)]
    return words


def _check_expert_lora(options: ServerOptions, parsed: Namespace, adapter: ServedAdapter) -> None:
    """Refuse now what the server would refuse minutes later (sglang-kt 0.7.2, server_args.py and kt_ep_wrapper.py)."""
    problems, found = [], partial(options.value, parsed)
    if found("--kt-num-gpu-experts") or found("--kt-gpu-experts-ratio"):
        problems.append("all experts must be on the CPU (kt_num_gpu_experts: 0, and no kt_gpu_experts_ratio)")
    if (running := found("--max-running-requests")) is not None and running < 2:
        problems.append(f"--max-running-requests must be at least 2, found {running}")
    for flag in ("--kt-gpu-prefill-token-threshold", "--kt-enable-dynamic-expert-update"):
        if found(flag):
            problems.append(f"{flag} must be left out")
    if adapter.name and (stages := found("--pp-size") or 1) > 1:
        problems.append(f"--pp-size must be 1 with an adapter that has more than experts, found {stages}")
    if adapter.name and (algorithm := found("--speculative-algorithm")) not in (None, "NGRAM"):
        problems.append(f"--speculative-algorithm {algorithm} does not work with LoRA")
    if problems:
        raise KTConfigError("The adapter has LoRA on routed experts: " + "; ".join(problems) + ".")


def _notices(parsed: Namespace, adapter: ServedAdapter) -> list[str]:
    if not adapter.experts:
        return []
    notices = [
        "CUDA graph is disabled because the adapter has LoRA on routed experts, which kt-kernel computes on the CPU "
        "within each step."
    ]
    if not adapter.required:
        notices.append(
            "Every request gets the experts' LoRA, also one to the base model: SGLang loads it once, when it starts."
        )
    if getattr(parsed, "kt_max_deferred_experts_per_token", None):
        notices.append("kt_max_deferred_experts_per_token does nothing with LoRA on routed experts.")
    return notices
