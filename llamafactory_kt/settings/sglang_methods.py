"""The formats of experts' weights that sglang-kt 0.7.2 takes (``--kt-method``).

Names: kt_kernel/experts.py of kt-kernel 0.7.2, INFERENCE_METHODS. Kernels for expert LoRA: sglang/srt/layers/moe/kt_ep_wrapper.py of
sglang-kt 0.7.2, _KT_SFT_METHOD_BY_INFERENCE_METHOD.
"""

from __future__ import annotations

from dataclasses import dataclass

_QUANTIZE = "llamafactory-kt quantize --method {} writes it"
_CONVERT = "kt-kernel's convert_cpu_weights.py writes it"


@dataclass(frozen=True)
class SGLangMethod:
    """One format."""

    name: str
    lora_kernel: str = ""
    """the kernel that computes expert LoRA on such weights; empty: there is none"""
    weights_from: str = ""
    """what writes the weights of kt_weight_path; empty: the method reads the checkpoint"""
    backend: str = ""
    """the ``kt_backend`` for the same weights; empty: the checkpoint is quantized already"""
    lora_reads_kt_files: bool = False
    """the kernel for expert LoRA reads only ``.kt`` files"""


METHODS = {
    method.name: method
    for method in (
        SGLangMethod("BF16", "AMXBF16_SFT", backend="AMXBF16"),
        SGLangMethod("AMXINT8", "AMXINT8_SFT", _QUANTIZE.format("amxint8"), "AMXINT8", lora_reads_kt_files=True),
        SGLangMethod("AMXINT4", "AMXINT4_SFT", _QUANTIZE.format("amxint4"), "AMXINT4"),
        SGLangMethod("FP8", "AMXFP8_SFT"),
        SGLangMethod("FP8_PERCHANNEL"),
        SGLangMethod("RAWINT4", "RAWINT4_SFT"),
        SGLangMethod("GPTQ_INT4"),
        SGLangMethod("SYCL_GPTQ_INT4"),
        SGLangMethod("MXFP4", "MXFP4_SFT"),
        SGLangMethod("NVFP4"),
        SGLangMethod("MXFP8"),
        SGLangMethod("MOE_INT8", weights_from=_CONVERT),
        SGLangMethod("MOE_INT4", weights_from=_CONVERT),
        SGLangMethod("LLAMAFILE", weights_from="it holds the model's GGUF files"),
    )
}
ALIASES = {"AMXBF16": "BF16", "AMXFP8": "FP8", "AUTO": "BF16"}
LORA_KERNELS = {method.lora_kernel: method.name for method in METHODS.values() if method.lora_kernel}
"""kernel for expert LoRA -> the format of its weights"""
BACKENDS = {method.backend: method.name for method in METHODS.values() if method.backend}
"""kt_backend, where kt-kernel's kernels of that name serve too -> the format"""
