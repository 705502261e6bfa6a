"""The adapter of a configuration, checked against the model and prepared in the form the installed server takes."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..adapters import Adapter, AdapterSet, ExpertsShape, open_adapter
from ..adapters.keys import split_module
from ..adapters.uniform import Uniform
from ..adapters.writing import write_moe_lora, write_sglang, write_sglang_merged, write_sglang_rest
from ..checkpoint.opening import MoEModel, empty_model
from ..engines.ktkernel import ENGINES
from ..ground.errors import KTAdapterError, KTConfigError, KTServerError, name_some
from ..ground.machine import gib
from ..settings.keys import adapter_directories, threadpool_count
from ..settings.sglang_keys import serving_method
from ..settings.sglang_methods import LORA_KERNELS, SGLangMethod
from .adapter_cache import prepared
from .options import INSTALL, Dialect, ServerOptions

logger = logging.getLogger(__name__)

LORA_NAME = "lora0"
"""what requests call the adapter, as in LLaMA-Factory's own SGLang engine"""


@dataclass(frozen=True)
class ServedAdapter:
    """An adapter as a server gets it."""

    flags: list[str] = field(default_factory=list)
    experts: bool = False
    """it has LoRA on routed experts, which a server applies to every request"""
    name: str | None = None
    """what requests must name to get the rest of it; None: there is no rest"""
    required: bool = False
    """the server refuses requests that do not name it"""


def serve_adapter(args: Any, options: ServerOptions, *, mla: bool) -> ServedAdapter:
    """Prepare the adapter of a configuration (LLaMA-Factory's ModelArguments with our fields), if it has one.

    Args:
        args: the configuration.
        options: the installed server.
        mla: whether the model has multi-head latent attention, whose projections the server does not join.

    Raises:
        KTAdapterError: It is broken, does not fit the model, or has parts the server has no place for.
        KTConfigError: The configuration says another rank or alpha, or a method without a kernel for expert LoRA.
        KTServerError: This server cannot have LoRA on routed experts.
    """
    directories = adapter_directories(args)
    moe_lora = Path(args.kt_moe_lora_path).expanduser() if args.kt_moe_lora_path else None
    if not directories and moe_lora is None:
        return ServedAdapter()
    adapter = open_adapter(directories[0] if directories else None, moe_lora)
    _check_targets(adapter, options)
    _check_joined(adapter, mla)
    if not adapter.layers:
        return _serve_rest(args, adapter, mla)
    if options.dialect is None:
        raise KTServerError(
            f"{adapter.expert_file} has LoRA on routed experts, which {options.version} cannot apply (it has neither "
            f"{' nor '.join(Dialect)}). {INSTALL}"
        )
    uniform = Uniform.of(adapter, _check_against_model(args, adapter))
    _check_said(args, adapter, uniform.lora_rank, uniform.lora_alpha)
    if options.dialect is Dialect.MOE_LORA:
        return _serve_moe_lora(args, uniform)
    if adapter.other_names:
        entry = _prepare(
            adapter, "sglang-merged", uniform.shapes, lambda path: write_sglang_merged(uniform, path / "merged")
        )
        # sglang-kt 0.7.2, tokenizer_manager.py, _validate_and_resolve_lora
        return ServedAdapter(_lora_paths(args, entry / "merged"), experts=True, name=LORA_NAME, required=True)
    entry = _prepare(adapter, "sglang", uniform.shapes, lambda path: write_sglang(uniform, path / "experts"))
    return ServedAdapter([Dialect.EXPERT_LORA.value, str(entry / "experts")], experts=True)


def _serve_rest(args: Any, adapter: Adapter, mla: bool) -> ServedAdapter:
    if mla and any(".kv_b_proj." in name for name in adapter.other_names):
        # sglang-kt 0.7.2, deepseek_v2.py, _apply_static_kv_b_lora_to_mla_query: with LoRA on routed experts only
        raise KTAdapterError(
            f"{adapter.store.path} has LoRA on kv_b_proj, but none on routed experts. SGLang's latent attention takes the weight of "
            "kv_b_proj apart and would leave this LoRA out while it decodes. Merge this adapter into the model "
            "(llamafactory-kt merge) and serve that."
        )
    _check_said(args, adapter, adapter.settings.r, adapter.settings.lora_alpha)
    entry = _prepare(adapter, "rest", None, lambda path: write_sglang_rest(adapter, path / "rest"))
    return ServedAdapter(_lora_paths(args, entry / "rest"), name=LORA_NAME)


def _serve_moe_lora(args: Any, uniform: Uniform) -> ServedAdapter:
    adapter = uniform.adapter

    def make(path: Path) -> None:
        write_moe_lora(uniform, path / "moe_lora.pt")
        if adapter.other_names:
            write_sglang_rest(adapter, path / "rest")

    entry = _prepare(adapter, "moe-lora", uniform.shapes, make)
    flags = [
        Dialect.MOE_LORA.value, str(entry / "moe_lora.pt"),
        "--kt-moe-lora-rank", str(uniform.lora_rank),
        "--kt-moe-lora-alpha", f"{uniform.lora_alpha:g}",
        "--kt-moe-sft-method", serving_method(args).lora_kernel,
    ]  # fmt: skip
    if not adapter.other_names:
        return ServedAdapter(flags, experts=True)
    return ServedAdapter([*flags, *_lora_paths(args, entry / "rest")], experts=True, name=LORA_NAME)


def _lora_paths(args: Any, directory: Path) -> list[str]:
    return [
        "--lora-paths", f"{LORA_NAME}={directory}",
        "--max-loras-per-batch", "1",
        "--lora-backend", args.sglang_lora_backend,
    ]  # fmt: skip


def _prepare(adapter: Adapter, form: str, shapes: dict[int, ExpertsShape] | None, make: Callable[[Path], None]) -> Path:
    def checked(path: Path) -> None:
        logger.info("Preparing %s for SGLang (%s)", adapter.directory, form)
        adapter.check_finite(adapter.other_names)
        make(path)

    entry = prepared(adapter, form, shapes, checked)
    logger.info("SGLang gets the adapter %s from %s (%s, %s)", adapter.directory, entry.path, form, gib(entry.nbytes))
    return entry.path


def _check_targets(adapter: Adapter, options: ServerOptions) -> None:
    """The modules beside the experts must be ones the server has LoRA for, by the choices of its own option."""
    known = options.choices("--lora-target-modules")
    targets = {split_module(name)[0].rpartition(".")[2] for name in adapter.other_names}
    if unknown := sorted(targets - set(known)) if known else []:
        raise KTAdapterError(
            f"{adapter.store.path}: {options.version} has no LoRA for {name_some(unknown)}; it has it for "
            f"{', '.join(known)}. Merge this adapter into the model (llamafactory-kt merge) and serve that."
        )


def _check_joined(adapter: Adapter, mla: bool) -> None:
    """Modules that the server joins must have LoRA together. It fills in zeros for k and for up only (lora.py of
    sglang-kt 0.7.2, normalize_qkv_proj and normalize_gate_up_proj)."""
    partners = {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"} | ({} if mla else {"q_proj": "v_proj"})
    modules = {split_module(name)[0] for name in adapter.other_names}
    missing = {
        f"{parent}.{partners[leaf]}"
        for parent, _, leaf in (module.rpartition(".") for module in modules)
        if leaf in partners and f"{parent}.{partners[leaf]}" not in modules
    }
    if missing:
        raise KTAdapterError(
            f"{adapter.store.path} has LoRA on other parts of what SGLang joins (q, k and v; gate and up), but not on "
            f"{name_some(sorted(missing), 2)}. Merge this adapter into the model (llamafactory-kt merge) and serve that."
        )


def _check_against_model(args: Any, adapter: Adapter) -> dict[int, ExpertsShape]:
    """The model's experts, all layers that have any: the server wants tensors for each of them."""
    method = serving_method(args)
    _check_kernel(args, method)
    moe = MoEModel(empty_model(args.model_name_or_path, quantised=not method.backend))
    moe.fit(AdapterSet((adapter,)))
    _check_sizes(args, method, moe.experts[0].shape)
    return moe.shapes


def _check_sizes(args: Any, method: SGLangMethod, shape: ExpertsShape) -> None:
    """The kernel must take the experts' sizes as they are: SGLang pads nothing."""
    packing = next((engine.method for engine in ENGINES if engine.name == method.backend), None)
    if packing is None:  # not one that we have measured
        return
    pools = threadpool_count(args)
    wanted = packing.padded(shape.hidden_size), packing.padded(shape.intermediate_size, pools)
    if wanted != (shape.hidden_size, shape.intermediate_size):
        raise KTAdapterError(
            f"{args.model_name_or_path}: hidden_size {shape.hidden_size} must be a multiple of {packing.multiple}, and "
            f"moe_intermediate_size {shape.intermediate_size} one of {packing.multiple * pools} (kt_threadpool_count: {pools}): "
            f"SGLang gives them to kt-kernel's {method.name} kernel for expert LoRA as they are. infer_backend: huggingface pads them."
        )


def _check_kernel(args: Any, method: SGLangMethod) -> None:
    """The method must have a kernel for expert LoRA, and the weights must be in the files that it reads."""
    if not method.lora_kernel:
        raise KTConfigError(
            f"kt_method: {method.name} has no kernel for the LoRA of routed experts; use one of "
            f"{', '.join(LORA_KERNELS.values())}."
        )
    if method.lora_reads_kt_files and not any(Path(args.kt_weight_path).expanduser().glob("_layer_*/_numa_0/*.kt")):
        raise KTConfigError(
            f"kt_weight_path: {args.kt_weight_path} has no _layer_N/_numa_N/*.kt files. kt-kernel's {method.name} kernel reads only those "
            "where experts have LoRA, and not the safetensors files that serve without it. llamafactory-kt quantize "
            "--method int8 writes them."
        )


def _check_said(args: Any, adapter: Adapter, rank: int, alpha: float) -> None:
    """kt_moe_lora_rank and kt_moe_lora_alpha must be the adapter's: those of its configuration, or those after folding."""
    settings = adapter.settings
    for key, own, folded in (
        ("kt_moe_lora_rank", settings.r, rank),
        ("kt_moe_lora_alpha", settings.lora_alpha, alpha),
    ):
        said = getattr(args, key)
        if said not in (None, own, folded):
            raise KTConfigError(
                f"{key} is {said:g}, but {settings.path} says {own:g}. The adapter knows best: remove the key."
            )
