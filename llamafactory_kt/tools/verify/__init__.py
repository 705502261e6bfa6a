"""``llamafactory-kt verify``: do a loaded model's experts compute what checkpoint and adapter say, layer by layer?"""

from .layers import ExpertsInputs, LayerResult, record_inputs, verify_layers

__all__ = ["ExpertsInputs", "LayerResult", "record_inputs", "verify_layers"]
