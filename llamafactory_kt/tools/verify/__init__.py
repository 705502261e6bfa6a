"""``llamafactory-kt verify``: does a loaded model compute what checkpoint and adapter say, experts and all else?"""

from .dense import DenseResult, verify_dense
from .layers import ExpertsInputs, LayerResult, record_inputs, verify_layers

__all__ = ["DenseResult", "ExpertsInputs", "LayerResult", "record_inputs", "verify_dense", "verify_layers"]
