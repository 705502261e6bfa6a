"""``llamafactory-kt quantize``: weights packed once, into files that later loads only read (``kt_weight_path``)."""

from .run import QuantizeReport, quantize_model

__all__ = ["QuantizeReport", "quantize_model"]
