"""The adapter of a configuration, checked against the model and prepared in the form the installed server takes."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..adapters import Adapter, AdapterSet, ExpertsShape, open_adapter
from ..adapters.keys import split_module
from ..adapters.uniform import Uniform
from ..adapters.writing import write_moe_lora, write_sglang, write_sglang_merged, write_sglang_rest
from ..checkpoint.discovery import formulas
from ..checkpoint.formula import PLAIN
from ..checkpoint.opening import MoEModel, empty_model
from ..engines.ktkernel import packing_of
from ..ground.errors import KTAdapterError, KTConfigError, KTModelError, KTServerError, name_some
from ..settings.keys import adapter_directories, expanded, threadpool_count
from ..settings.sglang_keys import serving_method
from ..settings.sglang_methods import LORA_KERNELS, SGLangMethod
from .adapter_cache import prepared
from .options import INSTALL, Dialect, ServerOptions

LORA_NAME = "lora0"
"""the adapter's name in requests, as in LLaMA-Factory's own SGLang engine"""

_MERGE = "Merge this adapter into the model (llamafactory-kt merge) and serve that."


@dataclass(frozen=True)
class ServedAdapter:
    """An adapter in the form that a server takes."""

    flags: list[str] = field(default_factory=list)
    experts: bool = False
    """it has LoRA on routed experts, which a server applies to every request"""
    name: str | None = None
    """what a request must name to get the LoRA on other modules; None: there is none"""
    required: bool = False
    """the server refuses requests that do not name it"""


def serve_adapter(args: Any, options: ServerOptions, *, mla: bool) -> ServedAdapter:
    """Prepare the adapter of a configuration (LLaMA-Factory's ModelArguments with our fields), if it has one.

    Args:
        args: the configuration.
        options: the installed server.
        mla: whether the model has multi-head latent attention, whose projections the server does not fuse.

    Raises:
        KTAdapterError: It is broken, does not fit the model, or has LoRA on modules for which the server has none.
        KTConfigError: The configuration says another rank or alpha, or a method without a kernel for expert LoRA.
        KTServerError: This server cannot apply LoRA on routed experts.
    """
    directories, moe_lora = adapter_directories(args), expanded(args.kt_moe_lora_path)
    if not directories and moe_lora is None:
        return ServedAdapter()
    adapter = open_adapter(directories[0] if directories else None, moe_lora)
    _check_targets(adapter, options)
    _check_fused(adapter, mla)
    if not adapter.layers:
        return _serve_rest(args, adapter, mla)
    if options.dialect is None:
        raise KTServerError(
            f"{adapter.expert_file} has LoRA on routed experts, which {options.version} cannot apply (it has neither "
            f"{' nor '.join(Dialect)}). {INSTALL}"
        )
    method = serving_method(args)
    _check_kernel(args, method)
    moe = MoEModel(empty_model(args.model_name_or_path, quantized=not method.backend))
    for formula in formulas(moe.experts):
        if formula != PLAIN:
            raise KTModelError(
                f"{args.model_name_or_path}: SGLang's kernel for expert LoRA computes {PLAIN} alone, but the model's experts are "
                f"{formula}. infer_backend: huggingface computes them."
            )
    moe.fit(AdapterSet((adapter,)))
    _check_sizes(args, method, moe.experts[0].shape)
    uniform = Uniform.of(adapter, moe.shapes)  # of all layers with experts: the server wants tensors for each
    _check_declared(args, adapter, uniform.lora_rank, uniform.lora_alpha)
    if options.dialect is Dialect.MOE_LORA:
        return _serve_moe_lora(args, uniform, method)
    if adapter.other_names:
        path = prepared(adapter, "sglang-merged", uniform.shapes, lambda p: write_sglang_merged(uniform, p / "merged"))
        # required: sglang-kt 0.7.2, tokenizer_manager.py, _validate_and_resolve_lora
        return ServedAdapter(_lora_paths(args, path / "merged"), experts=True, name=LORA_NAME, required=True)
    path = prepared(adapter, "sglang", uniform.shapes, lambda p: write_sglang(uniform, p / "experts"))
    return ServedAdapter([Dialect.EXPERT_LORA.value, str(path / "experts")], experts=True)


def _serve_rest(args: Any, adapter: Adapter, mla: bool) -> ServedAdapter:
    if mla and any(".kv_b_proj." in name for name in adapter.other_names):
        # sglang-kt 0.7.2, deepseek_v2.py, _apply_static_kv_b_lora_to_mla_query: only with LoRA on routed experts
        raise KTAdapterError(
            f"{adapter.store.path} has LoRA on kv_b_proj, but none on routed experts. SGLang's latent attention splits the "
            f"weight of kv_b_proj and ignores this LoRA while decoding. {_MERGE}"
        )
    _check_declared(args, adapter, adapter.settings.r, adapter.settings.lora_alpha)
    path = prepared(adapter, "rest", None, lambda p: write_sglang_rest(adapter, p / "rest"))
    return ServedAdapter(_lora_paths(args, path / "rest"), name=LORA_NAME)


def _serve_moe_lora(args: Any, uniform: Uniform, method: SGLangMethod) -> ServedAdapter:
    adapter = uniform.adapter

    def make(path: Path) -> None:
        write_moe_lora(uniform, path / "moe_lora.pt")
        if adapter.other_names:
            write_sglang_rest(adapter, path / "rest")

    path = prepared(adapter, "moe-lora", uniform.shapes, make)
    flags = [
        Dialect.MOE_LORA.value, str(path / "moe_lora.pt"),
        "--kt-moe-lora-rank", str(uniform.lora_rank),
        "--kt-moe-lora-alpha", f"{uniform.lora_alpha:g}",
        "--kt-moe-sft-method", method.lora_kernel,
    ]  # fmt: skip
    if not adapter.other_names:
        return ServedAdapter(flags, experts=True)
    return ServedAdapter([*flags, *_lora_paths(args, path / "rest")], experts=True, name=LORA_NAME)


def _lora_paths(args: Any, directory: Path) -> list[str]:
    paths = ["--lora-paths", f"{LORA_NAME}={directory}", "--max-loras-per-batch", "1"]
    return [*paths, "--lora-backend", args.sglang_lora_backend]


def _check_targets(adapter: Adapter, options: ServerOptions) -> None:
    """The server must support LoRA on the adapter's other modules, by the choices of its own option."""
    known = options.choices("--lora-target-modules")
    targets = {split_module(name)[0].rpartition(".")[2] for name in adapter.other_names}
    if unknown := sorted(targets - set(known)) if known else []:
        raise KTAdapterError(
            f"{adapter.store.path}: {options.version} has no LoRA for {name_some(unknown)}; it has it for "
            f"{', '.join(known)}. {_MERGE}"
        )


def _check_fused(adapter: Adapter, mla: bool) -> None:
    """Modules that the server fuses must all have LoRA. It fills in zeros for k and up only (sglang-kt 0.7.2, lora.py,
    normalize_qkv_proj and normalize_gate_up_proj)."""
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
            f"{name_some(sorted(missing), 2)}. {_MERGE}"
        )


def _check_sizes(args: Any, method: SGLangMethod, shape: ExpertsShape) -> None:
    """The kernel must accept the experts' sizes unpadded: SGLang pads nothing."""
    packing = packing_of(method.backend)
    if packing is None:  # unknown multiples
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
    """The method must have a kernel for expert LoRA, and that kernel must find the weights in files that it can read."""
    if not method.lora_kernel:
        raise KTConfigError(
            f"kt_method: {method.name} has no kernel for the LoRA of routed experts; use one of "
            f"{', '.join(LORA_KERNELS.values())}."
        )
    weights = expanded(args.kt_weight_path)
    if method.lora_reads_kt_files and not (weights and any(weights.glob("_layer_*/_numa_0/*.kt"))):
        raise KTConfigError(
            f"kt_weight_path: {args.kt_weight_path} has no _layer_N/_numa_N/*.kt files. With expert LoRA, kt-kernel's "
            f"{method.name} kernel reads only those; safetensors files serve without it. llamafactory-kt quantize --method amxint8 "
            "writes them."
        )


def _check_declared(args: Any, adapter: Adapter, rank: int, alpha: float) -> None:
    """kt_moe_lora_rank and kt_moe_lora_alpha must be the values of adapter_config.json, or ``rank`` and ``alpha`` as prepared."""
    settings = adapter.settings
    for key, own, folded in (
        ("kt_moe_lora_rank", settings.r, rank),
        ("kt_moe_lora_alpha", settings.lora_alpha, alpha),
    ):
        declared = getattr(args, key)
        if declared not in (None, own, folded):
            raise KTConfigError(
                f"{key} is {declared:g}, but {settings.path} says {own:g}. Remove the key; the adapter's value is used."
            )
